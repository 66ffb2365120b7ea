"""J and F against plain loops over pixels, and the summary of a video by hand."""

import numpy as np
import pytest

from dinojax import patches


def blob(seed, shape=(40, 60)):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    mask = np.zeros(shape, bool)
    for _ in range(3):
        row, column, radius = rng.uniform(5, 35), rng.uniform(5, 55), rng.uniform(3, 10)
        mask |= (y - row) ** 2 + (x - column) ** 2 < radius**2
    return mask


def boundary(mask):
    """Pixels that differ from the right, the lower or the lower right one; at the edges, from those that there are."""
    height, width = mask.shape
    found = set()
    for i in range(height):
        for j in range(width):
            others = [(i, j + 1), (i + 1, j), (i + 1, j + 1)]
            inside = [(p, q) for p, q in others if p < height and q < width]
            if any(mask[i, j] != mask[p, q] for p, q in inside):
                found.add((i, j))
    return found


def f_measure(mask, truth):
    ours, true = boundary(mask), boundary(truth)
    band = np.ceil(0.008 * np.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2))
    near = lambda point, others: any((point[0] - p) ** 2 + (point[1] - q) ** 2 <= band**2 for p, q in others)  # noqa: E731
    precision = sum(near(point, true) for point in ours) / len(ours)
    recall = sum(near(point, ours) for point in true) / len(true)
    return 2 * precision * recall / (precision + recall)


def test_measures_are_those_of_loops():
    for seed in range(4):
        mask, truth = blob(seed), blob(seed) ^ (blob(seed + 10) & (np.random.default_rng(seed).random((40, 60)) < 0.5))
        pairs = list(zip(mask.ravel(), truth.ravel()))
        j = sum(a and b for a, b in pairs) / sum(a or b for a, b in pairs)
        assert patches.region_similarity(mask, truth) == pytest.approx(j, abs=1e-12)
        assert patches.boundary_measure(mask, truth) == pytest.approx(f_measure(mask, truth), abs=1e-12)
    full = np.zeros((40, 60), bool)
    full[:, :30] = True  # reaches three edges of the image
    assert 0 < patches.boundary_measure(full, np.roll(full, 1, 1)) <= 1
    assert len(boundary(full)) == 40


def test_empty_masks():
    empty, some = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    some[5:9, 5:9] = True
    assert patches.region_similarity(empty, empty) == 1 and patches.boundary_measure(empty, empty) == 1
    assert patches.region_similarity(some, empty) == 0 and patches.boundary_measure(some, empty) == 0
    assert patches.boundary_measure(empty, some) == 0


def test_void_pixels_do_not_count():
    truth, mask = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    truth[4:8, 4:8] = mask[4:8, 4:8] = True
    mask[12:16, 12:16] = True
    void = np.zeros((20, 20), bool)
    void[11:17, 11:17] = True
    assert patches.region_similarity(mask, truth) == 0.5
    assert patches.region_similarity(mask, truth, void) == 1 and patches.boundary_measure(mask, truth, void) == 1


def test_a_video_is_summed_up_by_object_without_its_ends():
    """Ten frames in which object 1 loses a column a frame; the ends would be 0."""
    truth = np.zeros((10, 20, 20), np.uint8)
    truth[:, 4:14, 4:14] = 1
    truth[:, 16:19, 16:19] = 7
    masks = truth.copy()
    for frame in range(1, 9):
        masks[frame, 4:14, 14 - frame : 14] = 0
    masks[[0, -1]] = 0
    found = patches.video_scores(masks, truth)
    assert found.keys() == {1, 7}
    shares = np.array([1 - frame / 10 for frame in range(1, 9)])
    np.testing.assert_allclose(found[1]["J"].frames, shares)
    assert found[1]["J"].mean == pytest.approx(shares.mean())
    assert found[1]["J"].recall == pytest.approx((shares > 0.5).mean())
    # Quarters of 8 frames as DAVIS rounds them: the first three and the last three.
    assert found[1]["J"].decay == pytest.approx(shares[:3].mean() - shares[-3:].mean())
    assert found[7]["J"].mean == found[7]["F"].mean == 1
    assert patches.video_scores(masks, truth, ends=True)[1]["J"].frames[0] == 0
