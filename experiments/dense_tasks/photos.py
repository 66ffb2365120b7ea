"""Whole photos through a dense head: windows of every scale, blended on the grid of patches, then every pixel."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

from dinojax.dense import Blend, class_map, depth_map
from experiments.dense_tasks.head_file import HeadFile
from experiments.dense_tasks.targets import DepthMap, Mask
from experiments.dense_tasks.windows import Features, Geometry, Window

_AT_ONCE = 64  # windows
Scores = Float[np.ndarray, "_rows _columns outputs"]


def blended(
    head: HeadFile,
    windows: Sequence[Window],
    features: Iterable[Features],
    sizes: Sequence[tuple[int, int]],
    geometry: Geometry,
    scale: float,
) -> Iterator[Scores]:
    """The scores of each photo, patch by patch, in the order of the photos.

    Args:
        head: a trained one.
        windows: of the photos, in order; mirrored ones must not be among them.
        features: of the windows, in parts of any number.
        sizes: height and width of each photo.
        geometry: of the windows.
        scale: of the windows.
    """
    scores = (one for part in features for one in _scores(head, part))
    blend, current = None, -1
    for window, tile in zip(windows, scores, strict=True):
        if window.photo != current:
            if blend is not None:
                yield blend.scores()
            current = window.photo
            blend = Blend(*geometry.grid(sizes[current], scale), tile.shape[-1])
        blend.add(tile, window.top, window.left)
    if blend is not None:
        yield blend.scores()


def _scores(head: HeadFile, features: Features) -> Iterator[Scores]:
    for start in range(0, len(features), _AT_ONCE):
        yield from np.asarray(head.scores(features[start : start + _AT_ONCE]))


def predicted(head: HeadFile, scores: Sequence[Scores], size: tuple[int, int]) -> Mask | DepthMap:
    """The class or the depth of each pixel of a photo of `size` (height, width); `scores` are those of each scale."""
    if head.task == "segmentation":
        return class_map(scores, *size)
    return depth_map([one[..., 0] for one in scores], *size)
