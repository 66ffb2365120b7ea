"""Areas against counts of pairs, and their intervals against resampling the pixels themselves."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from experiments.patch_tasks import auroc


def maps(images=12, seed=0):
    rng = np.random.default_rng(seed)
    truth = [np.zeros((9, 11), bool) for _ in range(images)]
    for mask in truth[::2]:
        mask[2:6, 3:8] = True
    return [rng.standard_normal((9, 11)) + mask * rng.uniform(0, 2) for mask in truth], truth


def test_the_area_over_images_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    kinds = np.arange(30) % 3 == 0
    scores = np.round(rng.standard_normal(30) + kinds, 1)
    found = auroc.image_auroc(scores, kinds, seed=0)
    pairs = [(a > b) + (a == b) / 2 for a in scores[kinds] for b in scores[~kinds]]
    assert found["value"] == pytest.approx(np.mean(pairs), abs=1e-12)
    assert found["interval"][0] < found["value"] < found["interval"][1] and found["images"] == 30


def test_the_interval_over_pixels_is_that_of_resampled_images():
    values, truth = maps(60)
    found = auroc.pixel_auroc(values, truth, seed=0)
    flat = np.concatenate([one.ravel() for one in truth]), np.concatenate([one.ravel() for one in values])
    assert found["value"] == pytest.approx(roc_auc_score(*flat), abs=1e-12)
    rng, areas = np.random.default_rng(5), []
    for _ in range(400):
        drawn = np.concatenate([rng.choice(np.arange(start, 60, 2), 30) for start in (0, 1)])
        areas.append(roc_auc_score(np.concatenate([truth[i].ravel() for i in drawn]),
                                   np.concatenate([values[i].ravel() for i in drawn])))  # fmt: skip
    np.testing.assert_allclose(found["interval"], np.percentile(areas, (2.5, 97.5)), atol=0.01)


def test_bins_move_an_area_by_little():
    values, truth = maps()
    scores, inside = np.concatenate([v.ravel() for v in values]), np.concatenate([t.ravel() for t in truth])
    edges = np.unique(np.quantile(scores, np.linspace(0, 1, 201)[1:-1]))
    bins = np.searchsorted(edges, scores, side="right")
    negative, positive = (np.bincount(bins[inside == kind], minlength=200).astype(float) for kind in (False, True))
    assert auroc._binned_area(negative, positive) == pytest.approx(roc_auc_score(inside, scores), abs=1e-3)
