"""The linear probe of patches against scikit-learn; the first component against its own map."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dinojax import UserError, maps, patches


def images(seed=0):
    rng = np.random.default_rng(seed)
    features, inside = [], []
    for rows, columns in ((6, 7), (5, 9)):
        mask = np.zeros((rows, columns), bool)
        mask[1:-1, 2:-2] = True
        found = rng.standard_normal((rows, columns, 8)).astype(np.float32)
        found[mask] += 0.8
        features.append(found)
        inside.append(mask)
    return features, inside


def test_the_probe_is_that_of_scikit_learn():
    features, inside = images()
    head = patches.fit_foreground(features, inside, C=0.3)
    flat = np.concatenate([one.reshape(-1, 8) for one in features]).astype(float)
    truth = LogisticRegression(C=0.3, tol=1e-10, max_iter=10_000).fit(flat, np.concatenate([m.ravel() for m in inside]))
    for one in features:
        expected = truth.predict_proba(one.reshape(-1, 8).astype(float))[:, 1].reshape(one.shape[:2])
        np.testing.assert_allclose(patches.foreground_probability(head, one), expected, atol=2e-4)


def test_shares_of_patches():
    mask = np.zeros((6, 9), bool)
    mask[:4, :5] = True
    np.testing.assert_allclose(patches.patch_shares(mask, 3), [[1, 2 / 3, 0], [1 / 3, 2 / 9, 0]])
    with pytest.raises(ValueError, match="reshape"):
        patches.patch_shares(mask, 4)


def test_the_first_component_is_high_inside():
    features, inside = images()
    for image, mask in zip(features, inside):
        image[mask, 3] += 20
    for scores, mask in zip(maps.foreground_scores(features), inside):
        assert scores[mask].min() > scores[~mask].max()
    flipped = maps.foreground_scores(features, flip=True)
    for scores, other in zip(maps.foreground_scores(features), flipped):
        np.testing.assert_allclose(other, 1 - scores, atol=1e-12)


def test_masks_without_both_are_refused():
    features, inside = images()
    with pytest.raises(UserError, match="all 87 patches of the masks are background"):
        patches.fit_foreground(features, [np.zeros_like(one) for one in inside])
    with pytest.raises(UserError, match="2 images and 1 masks were given"):
        patches.fit_foreground(features, inside[:1])
