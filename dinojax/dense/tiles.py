"""Tiles of a photo that is larger than what a model sees at once: where they lie, and how their scores are blended.

Everything is counted in patches. Scores are blended patch by patch, before they are interpolated to pixels: the whole
photo then has one vector per patch, which fits memory where the scores of all pixels do not.

Source: mmsegmentation `EncoderDecoder.slide_inference`, which averages overlapping tiles with equal weights. Here a
tile counts less towards its borders, so that no seams show.
"""

import numpy as np
from jaxtyping import Array, Float


def tile_starts(cells: int, tile: int, overlap: float) -> tuple[int, ...]:
    """The first cell of each tile along a side; tiles are evenly spread and cover every cell.

    Args:
        cells: of the side.
        tile: cells of a tile; one that is longer than the side is cut to it, and starts at 0.
        overlap: least share of a tile that its neighbour covers too, 0 or more and below 1.
    """
    room = cells - tile
    if room <= 0:
        return (0,)
    step = max(1, int(tile * (1 - overlap)))
    count = -(-room // step) + 1
    return tuple(int(start) for start in np.round(np.linspace(0, room, count)))


def tile_weights(rows: int, columns: int) -> Float[np.ndarray, "{rows} {columns}"]:
    """How much each cell of a tile counts: most in the centre, falling along a line towards each border, never 0."""
    down, across = (np.minimum(np.arange(n) + 0.5, n - np.arange(n) - 0.5) * 2 / n for n in (rows, columns))
    return np.outer(down, across).astype(np.float32)


class Blend:
    """The weighted mean of the scores of tiles, over all patches of a photo.

    Args:
        rows: patches of the photo from top to bottom.
        columns: patches of the photo from left to right.
        outputs: scores of a patch.
    """

    def __init__(self, rows: int, columns: int, outputs: int):
        self._sums = np.zeros((rows, columns, outputs), np.float32)
        self._weights = np.zeros((rows, columns, 1), np.float32)

    def add(self, scores: Float[Array | np.ndarray, "rows columns outputs"], top: int, left: int) -> None:
        """Adds a tile whose upper left patch is at row `top` and column `left`."""
        rows, columns = scores.shape[:2]
        weights = tile_weights(rows, columns)[..., None]
        inside = slice(top, top + rows), slice(left, left + columns)
        self._sums[inside] += weights * np.asarray(scores)
        self._weights[inside] += weights

    def scores(self) -> Float[np.ndarray, "rows columns outputs"]:
        """The blended scores.

        Raises:
            ValueError: a patch that no tile covers.
        """
        if not self._weights.all():
            raise ValueError("some patches are covered by no tile")
        return self._sums / self._weights
