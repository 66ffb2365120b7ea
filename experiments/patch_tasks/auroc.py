"""Area under the ROC curve over images and over pixels, with bootstrap intervals over the images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

RESAMPLES, INTERVAL = 1000, (2.5, 97.5)
_BINS = 2000  # of pixel scores, equally filled: they move an area by about 1e-4 at most


def image_auroc(
    scores: Float[np.ndarray, " images"], anomalous: Bool[np.ndarray, " images"], *, seed: int
) -> dict[str, Any]:
    """The area, and its 95 % interval over images resampled among the anomalous and among the others."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(anomalous == kind) for kind in (False, True)]
    areas = []
    for _ in range(RESAMPLES):
        drawn = np.concatenate([rng.choice(group, len(group)) for group in groups])
        areas.append(roc_auc_score(anomalous[drawn], scores[drawn]))
    return _summary(roc_auc_score(anomalous, scores), areas, len(scores))


def pixel_auroc(
    maps: Sequence[Float[np.ndarray, "_height _width"]],
    truth: Sequence[Bool[np.ndarray, "_height _width"]],
    *,
    seed: int,
) -> dict[str, Any]:
    """The area over the pixels of all images, and its 95 % interval over resampled images.

    The area itself is exact. For the interval, pixels are counted in bins of their score: resampling images is then
    adding up counts.
    """
    from sklearn.metrics import roc_auc_score

    scores = np.concatenate([one.ravel() for one in maps])
    inside = np.concatenate([one.ravel() for one in truth])
    edges = np.unique(np.quantile(scores, np.linspace(0, 1, _BINS + 1)[1:-1]))
    counts = np.zeros((2, len(maps), len(edges) + 1))
    for index, (one, mask) in enumerate(zip(maps, truth)):
        bins = np.searchsorted(edges, one.ravel(), side="right")
        for kind in (0, 1):
            counts[kind, index] = np.bincount(bins[mask.ravel() == bool(kind)], minlength=len(edges) + 1)
    rng, areas = np.random.default_rng(seed), []
    groups = [np.flatnonzero([mask.any() == kind for mask in truth]) for kind in (False, True)]
    for _ in range(RESAMPLES):
        drawn = np.concatenate([rng.choice(group, len(group)) for group in groups if len(group)])
        times = np.bincount(drawn, minlength=len(maps))
        areas.append(_binned_area(times @ counts[0], times @ counts[1]))
    return _summary(roc_auc_score(inside, scores), areas, len(maps))


def _binned_area(negative: np.ndarray, positive: np.ndarray) -> float:
    """The share of pairs that are in the right order; pairs of one bin count half."""
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))


def _summary(area: float, areas: Sequence[float], images: int) -> dict[str, Any]:
    return {"value": float(area), "interval": np.percentile(areas, INTERVAL).tolist(), "images": images}
