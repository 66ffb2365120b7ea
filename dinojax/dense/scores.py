"""Scores of dense predictions: intersection over union of classes, and errors of depth."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from dinojax.dense.losses import VOID

_INTERVAL = (2.5, 97.5)  # percentiles
_RATIO = 1.25


class SegmentationScores(NamedTuple):
    """Scores of masks, as fractions.

    Attributes:
        mean_iou: mean of `class_iou` over the classes that occur.
        pixel_accuracy: share of pixels whose class is right.
        mean_accuracy: mean over the classes of the truth of the share of their pixels that are right.
        class_iou: intersection over union of each class; not a number for one in neither truth nor prediction.
    """

    mean_iou: float
    pixel_accuracy: float
    mean_accuracy: float
    class_iou: Float[np.ndarray, " classes"]


class DepthScores(NamedTuple):
    """Errors of one depth map: root mean square in metres, mean relative error, share of pixels within a ratio of 1.25.

    Not a number where no pixel was measured.
    """

    rmse: float
    abs_rel: float
    delta1: float


def class_counts(
    predicted: UInt8[np.ndarray, "*pixels"], truth: UInt8[np.ndarray, "*pixels"], classes: int
) -> Int[np.ndarray, "{classes} {classes}"]:
    """Pixels by true class (row) and predicted class, without those whose truth is `VOID`."""
    valid = truth != VOID
    pairs = truth[valid].astype(np.int64) * classes + predicted[valid]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def segmentation_scores(counts: Int[np.ndarray, "classes classes"]) -> SegmentationScores:
    """Scores from the counts of all pixels of all images; see `class_counts`."""
    hits, truth = counts.diagonal(), counts.sum(axis=1)
    union = truth + counts.sum(axis=0) - hits
    iou, recall = (np.divide(hits, whole, out=np.full(len(hits), np.nan), where=whole > 0) for whole in (union, truth))
    total = counts.sum()
    if total == 0:
        return SegmentationScores(np.nan, np.nan, np.nan, iou)
    return SegmentationScores(float(np.nanmean(iou)), float(hits.sum() / total), float(np.nanmean(recall)), iou)


def mean_iou_interval(
    counts: Int[np.ndarray, "images classes classes"], *, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean IoU: images are drawn with replacement, all their pixels together."""
    hits = np.diagonal(counts, axis1=1, axis2=2)
    union = counts.sum(axis=1) + counts.sum(axis=2) - hits
    drawn = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), resamples)
    hits, union = drawn @ hits, drawn @ union
    iou = np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0)
    known = (union > 0).any(axis=1)
    if not known.any():
        return np.nan, np.nan
    low, high = np.percentile(np.nanmean(iou[known], axis=1), _INTERVAL)
    return float(low), float(high)


def depth_scores(predicted: Float[np.ndarray, "*pixels"], truth: Float[np.ndarray, "*pixels"]) -> DepthScores:
    """Errors over the pixels of one image that were measured, those whose truth is above 0."""
    valid = truth > 0
    if not valid.any():
        return DepthScores(np.nan, np.nan, np.nan)
    p, t = (array[valid].astype(np.float64) for array in (predicted, truth))
    ratio = np.maximum(p / t, t / p)
    return DepthScores(
        float(np.sqrt(np.mean((p - t) ** 2))), float(np.mean(np.abs(p - t) / t)), float(np.mean(ratio < _RATIO))
    )
