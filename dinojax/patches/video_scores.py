"""How well masks of a video agree with the true ones: DAVIS's region similarity J and boundary measure F.

Source: Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation" (CVPR 2016), and
davisvideochallenge/davis2017-evaluation (the width of the band, empty masks, the void label, the frames that count).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

VOID = 255
_BAND = 0.008  # of the image's diagonal: boundaries that are not further apart agree


def region_similarity(
    mask: Bool[np.ndarray, "height width"],
    truth: Bool[np.ndarray, "height width"],
    void: Bool[np.ndarray, "height width"] | None = None,
) -> float:
    """J: the intersection of two masks over their union; 1 where both are empty. Pixels in `void` do not count."""
    there = np.ones(mask.shape, bool) if void is None else ~void
    union = int(((mask | truth) & there).sum())
    return int((mask & truth & there).sum()) / union if union else 1.0


def boundary_measure(
    mask: Bool[np.ndarray, "height width"],
    truth: Bool[np.ndarray, "height width"],
    void: Bool[np.ndarray, "height width"] | None = None,
) -> float:
    """F: the harmonic mean of precision and recall of the boundary, within 0.8 % of the image's diagonal (rounded up).

    It is 1 where neither mask has a boundary, 0 where one has none. Pixels in `void` are background in both.
    """
    there = np.ones(mask.shape, bool) if void is None else ~void
    boundaries = [_boundary(one & there) for one in (mask, truth)]
    counts = [int(one.sum()) for one in boundaries]
    if not all(counts):
        return float(not any(counts))
    band = np.ceil(_BAND * np.hypot(*mask.shape))
    precision, recall = (
        int((one & _within(other, band)).sum()) / count
        for one, other, count in zip(boundaries, reversed(boundaries), counts)
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class VideoScores(NamedTuple):
    """The measures of one object in a video.

    Attributes:
        mean: over the frames.
        recall: share of the frames above 0.5.
        decay: the mean of the first quarter of the frames minus that of the last.
        frames: of each frame.
    """

    mean: float
    recall: float
    decay: float
    frames: Float[np.ndarray, " frames"]


def video_scores(
    masks: UInt8[np.ndarray, "frames height width"],
    truth: UInt8[np.ndarray, "frames height width"],
    *,
    ends: bool = False,
) -> dict[int, dict[str, VideoScores]]:
    """J and F of each object of a video.

    Args:
        masks: an object's number for each pixel, 0 for the background.
        truth: the same; 255 is void.
        ends: whether the first and the last frame count; those of DAVIS do not.

    Returns:
        The number of an object in `truth` → "J" and "F" → its scores.
    """
    masks, truth = (masks, truth) if ends else (masks[1:-1], truth[1:-1])
    objects = sorted(set(np.unique(truth).tolist()) - {0, VOID})
    void = truth == VOID
    found = {}
    for number in objects:
        pairs = [(mask == number, true == number, hidden) for mask, true, hidden in zip(masks, truth, void)]
        found[number] = {
            "J": _summary(np.array([region_similarity(*pair) for pair in pairs])),
            "F": _summary(np.array([boundary_measure(*pair) for pair in pairs])),
        }
    return found


def _summary(values: np.ndarray) -> VideoScores:
    edges = np.round(np.linspace(0, len(values) - 1, 5) + 1e-10).astype(int)  # neighbours share a frame
    first, last = (values[edges[i] : edges[i + 1] + 1].mean() for i in (0, 3))
    return VideoScores(float(values.mean()), float((values > 0.5).mean()), float(first - last), values)


def _boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels that differ from their right, lower or lower right neighbour."""
    found = np.zeros(mask.shape, bool)
    found[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    found[:-1] |= mask[:-1] != mask[1:]
    found[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return found


def _within(boundary: np.ndarray, band: float) -> np.ndarray:
    """The pixels whose distance to a boundary is at most `band`."""
    from scipy.ndimage import distance_transform_edt

    return distance_transform_edt(~boundary) <= band
