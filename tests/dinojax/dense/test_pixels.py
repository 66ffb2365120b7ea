"""Tiles, maps of pixels, and scores against plain loops, PyTorch and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score
from torch.nn.functional import interpolate

from dinojax.dense import (
    VOID,
    Blend,
    class_counts,
    class_map,
    depth_map,
    depth_scores,
    mean_iou_interval,
    segmentation_scores,
    tile_starts,
    tile_weights,
)


@pytest.mark.parametrize("cells", [7, 8, 9, 31, 64, 65])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.9])
def test_tiles_cover_a_side_and_overlap(cells, overlap):
    starts = tile_starts(cells, 8, overlap)
    assert starts[0] == 0 and starts[-1] == max(cells - 8, 0)
    gaps = np.diff(starts)
    assert (gaps > 0).all() and (gaps <= max(1, int(8 * (1 - overlap)))).all()


def test_a_side_of_one_tile_has_no_second_one():
    assert tile_starts(8, 8, 0.5) == (0,)
    assert len(tile_starts(16, 8, 0)) == 2


def test_tiles_of_a_patchwise_function_blend_to_that_of_the_whole():
    """What is computed patch by patch does not depend on the tile."""
    photo = np.random.default_rng(0).normal(size=(21, 13, 4)).astype(np.float32)
    blend = Blend(21, 13, 4)
    for top in tile_starts(21, 8, 0.3):
        for left in tile_starts(13, 8, 0.3):
            blend.add(photo[top : top + 8, left : left + 8], top, left)
    np.testing.assert_allclose(blend.scores(), photo, rtol=0, atol=1e-6)


def test_a_patch_counts_by_its_distance_from_the_border_of_the_tile():
    """Two tiles of 4 × 1 patches that share two: weights 1, 3, 3, 1 (over 4) from the border to the border."""
    blend = Blend(6, 1, 1)
    blend.add(np.zeros((4, 1, 1), np.float32), 0, 0)
    blend.add(np.ones((4, 1, 1), np.float32), 2, 0)
    np.testing.assert_allclose(blend.scores()[:, 0, 0], [0, 0, 1 / 4, 3 / 4, 1, 1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(tile_weights(4, 1)[:, 0], [0.25, 0.75, 0.75, 0.25])


def test_a_hole_between_tiles_is_a_bug():
    blend = Blend(4, 4, 1)
    blend.add(np.zeros((4, 2, 1), np.float32), 0, 0)
    with pytest.raises(ValueError, match="covered by no tile"):
        blend.scores()


def interpolated(scores, size):
    planes = torch.from_numpy(scores).permute(2, 0, 1)[None]
    return interpolate(planes, size=size, mode="bilinear", align_corners=False)[0].numpy()


@pytest.mark.parametrize("size", [(64, 64), (150, 70), (333, 9), (5, 6)])
def test_class_maps_are_those_of_interpolated_scores(size):
    """Several blocks, parts of blocks, and maps smaller than the patches."""
    scores = np.random.default_rng(0).normal(size=(9, 7, 5)).astype(np.float32)
    planes = interpolated(scores, size)
    found = class_map([scores], *size)
    ranked = np.sort(planes, axis=0)
    clear = ranked[-1] - ranked[-2] > 1e-5
    assert found.shape == size and clear.mean() > 0.99
    np.testing.assert_array_equal(found[clear], planes.argmax(axis=0)[clear])


def test_several_scales_are_averaged_as_probabilities():
    rng = np.random.default_rng(0)
    scales = [(3 * rng.normal(size=(side, side + 1, 4))).astype(np.float32) for side in (4, 9)]
    mean = sum(torch.softmax(torch.from_numpy(interpolated(one, (80, 70))), 0) for one in scales).numpy()
    ranked = np.sort(mean, axis=0)
    clear = ranked[-1] - ranked[-2] > 1e-5
    np.testing.assert_array_equal(class_map(scales, 80, 70)[clear], mean.argmax(axis=0)[clear])


def test_equal_scores_give_the_lower_class():
    assert not class_map([np.zeros((2, 2, 3), np.float32)], 10, 10).any()


def test_depth_maps_are_interpolated_means():
    rng = np.random.default_rng(0)
    scales = [rng.uniform(1, 9, (side, side + 2)).astype(np.float32) for side in (4, 7)]
    truth = sum(interpolated(one[..., None], (100, 90))[0] for one in scales) / 2
    np.testing.assert_allclose(depth_map(scales, 100, 90), truth, rtol=0, atol=1e-5)


@pytest.fixture
def masks():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (40, 10, 8)).astype(np.uint8)
    predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 5, truth.shape)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.2] = VOID
    return predicted, truth


def test_scores_of_masks_are_those_of_scikit_learn(masks):
    """Six classes: the fifth is only predicted, the sixth occurs nowhere."""
    predicted, truth = masks
    valid = truth != VOID
    counts = class_counts(predicted, truth, 6)
    np.testing.assert_array_equal(counts, confusion_matrix(truth[valid], predicted[valid], labels=range(6)))
    found = segmentation_scores(counts)
    iou = jaccard_score(truth[valid], predicted[valid], labels=range(5), average=None)
    np.testing.assert_allclose(found.class_iou[:5], iou, rtol=1e-12)
    assert np.isnan(found.class_iou[5]) and found.class_iou[4] == 0
    assert found.mean_iou == pytest.approx(iou.mean(), rel=1e-12)
    assert found.pixel_accuracy == pytest.approx(accuracy_score(truth[valid], predicted[valid]), rel=1e-12)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = balanced_accuracy_score(truth[valid], predicted[valid])
    assert found.mean_accuracy == pytest.approx(balanced, rel=1e-12)


def test_the_interval_is_that_of_images_drawn_one_by_one(masks):
    predicted, truth = masks
    counts = np.stack([class_counts(*one, 6) for one in zip(predicted, truth)])
    found = mean_iou_interval(counts, resamples=4000)
    rng = np.random.default_rng(1)
    drawn = [segmentation_scores(counts[rng.integers(0, 40, 40)].sum(axis=0)).mean_iou for _ in range(4000)]
    np.testing.assert_allclose(found, np.percentile(drawn, (2.5, 97.5)), rtol=0, atol=2e-3)


def test_scores_of_nothing_are_no_numbers():
    empty = np.zeros((2, 3, 3), int)
    assert np.isnan(segmentation_scores(empty[0])[:3]).all() and np.isnan(mean_iou_interval(empty)).all()
    assert np.isnan(depth_scores(np.ones((2, 2)), np.zeros((2, 2)))).all()


def test_errors_of_depth_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    truth, predicted = rng.uniform(1, 5, (8, 9)), rng.uniform(1, 5, (8, 9))
    truth[0] = 0
    pairs = [(p, t) for p, t in zip(predicted.ravel(), truth.ravel()) if t > 0]
    found = depth_scores(predicted, truth)
    assert found.rmse == pytest.approx((sum((p - t) ** 2 for p, t in pairs) / len(pairs)) ** 0.5, rel=1e-12)
    assert found.abs_rel == pytest.approx(sum(abs(p - t) / t for p, t in pairs) / len(pairs), rel=1e-12)
    assert found.delta1 == pytest.approx(sum(max(p / t, t / p) < 1.25 for p, t in pairs) / len(pairs), rel=1e-12)
