"""The coreset against the greedy loop, distances and maps against numpy and SciPy."""

import jax
import numpy as np
import pytest
import scipy.ndimage
import torch

from dinojax import UserError, patches


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def greedy(features, count, first):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    chosen = [first]
    while len(chosen) < count:
        distances = [min(1 - one @ unit[c] for c in chosen) for one in unit]
        chosen.append(max((i for i in range(len(unit)) if i not in chosen), key=lambda i: (distances[i], -i)))
    return chosen


@pytest.mark.parametrize(("count", "first", "dim"), [(1, 3, 4), (120, 0, 4), (90, 17, 2), (150, 5, 16)])
def test_the_coreset_is_that_of_the_greedy_loop(count, first, dim):
    """In two dimensions, an addition changes many distances at once; 150 patches are all of them."""
    features = random(150, dim) + 0.5
    with jax.enable_x64(True):
        found = patches.coreset(features, count, first=first)
    assert found.tolist() == greedy(features, count, first)


def test_equal_patches_are_added_last_and_once():
    features = random(6, 5)[np.array([0, 1, 0, 2, 3, 1, 4, 5])]
    found = patches.coreset(features, 8).tolist()
    assert sorted(found) == list(range(8)) and set(found[:6]) == {0, 1, 3, 4, 6, 7}


def test_distances_are_those_to_the_nearest_of_the_bank():
    features, bank = random(4, 5, 6), random(30, 6, seed=1)
    found = patches.patch_distances(features.astype(np.float32), bank.astype(np.float32))
    cosines = features @ bank.T / np.linalg.norm(features, axis=-1, keepdims=True) / np.linalg.norm(bank, axis=1)
    np.testing.assert_allclose(found, 1 - cosines.max(axis=-1), atol=1e-6)
    assert patches.patch_distances(bank[:1, None], bank).min() == pytest.approx(0, abs=1e-6)


def test_maps_are_enlarged_as_in_pytorch_and_blurred_as_in_scipy():
    distances = np.random.default_rng(0).random((5, 7)).astype(np.float32)
    large = torch.nn.functional.interpolate(torch.from_numpy(distances)[None, None], (33, 40), mode="bilinear")[0, 0]
    np.testing.assert_allclose(patches.anomaly_map(distances, 33, 40, sigma_px=0), large.numpy(), atol=1e-6)
    expected = scipy.ndimage.gaussian_filter(large.numpy().astype(float), 4)
    np.testing.assert_allclose(patches.anomaly_map(distances, 33, 40), expected, atol=1e-6)


def test_settings_that_no_bank_has_are_refused():
    with pytest.raises(UserError, match=r"count=11 is not between 1 and the 10 patches"):
        patches.coreset(random(10, 3), 11)
    with pytest.raises(UserError, match=r"first=10 is not the index of one of 10 patches"):
        patches.coreset(random(10, 3), 2, first=10)
    with pytest.raises(UserError, match=r"sigma_px=-1 is not 0 or more"):
        patches.anomaly_map(random(2, 2), 4, 4, sigma_px=-1)
