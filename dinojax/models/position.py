"""Position-embedding interpolation, exactly as the official models do it.

Bicubic resizing is separable, so it is one small matrix for rows and one for columns, built in numpy at trace time.
Three conventions exist, and they disagree by up to half of the largest value:

* DINO and plain DINOv2 (`antialias=False, offset=0.1`): the scale factor is (n + 0.1) / M instead of n / M for an
  M × M table and n target rows; kernel A = −0.75, four taps, indices clamped to the border.
* DINOv2 with registers (`antialias=True, offset=0.0`): scale n / M; kernel A = −0.5, widened when shrinking, weights
  renormalised at the border.
* Hugging Face `transformers` for plain DINOv2 (`antialias=False, offset=0.0`): scale n / M, kernel A = −0.75.

Source: `interpolate_pos_encoding` of facebookresearch/dino 7c446df and facebookresearch/dinov2 b8931f7, and
`torch.nn.functional.interpolate`, which both call.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dinojax.precision import at_least_float32


def interpolate_pos_embed(
    pos_embed: Float[Array, "1 positions dim"], rows: int, columns: int, *, antialias: bool, offset: float
) -> Float[Array, "1 tokens dim"]:
    """Resizes a square table of patch positions to `rows` × `columns`; the class entry in front is kept.

    Args:
        pos_embed: class entry, then a square table of patches in row-major order.
        rows: patches from top to bottom.
        columns: patches from left to right.
        antialias: smooth when shrinking.
        offset: added to `rows` and `columns` in the scale factor.

    Returns:
        The class entry and `rows` · `columns` patches, computed in float32 at least, in the dtype of `pos_embed`.
    """
    side = round((pos_embed.shape[1] - 1) ** 0.5)
    dtype = at_least_float32(pos_embed.dtype)
    table = pos_embed[0, 1:].astype(dtype).reshape(side, side, -1)
    to_rows, to_columns = (jnp.asarray(resize_matrix(side, n, antialias, offset), dtype) for n in (rows, columns))
    grid = jnp.einsum("rm,cn,mnd->rcd", to_rows, to_columns, table, precision="highest")
    patches = grid.reshape(1, rows * columns, -1).astype(pos_embed.dtype)
    return jnp.concatenate([pos_embed[:, :1], patches], axis=1)


@functools.lru_cache(maxsize=64)
def resize_matrix(side: int, size: int, antialias: bool, offset: float) -> Float[np.ndarray, "size side"]:
    """The float64 weight of each of `side` inputs in each of `size` outputs; each row sums to one."""
    step = side / (size + offset)  # input positions per output position
    centers = step * (np.arange(size) + 0.5)
    if not antialias:
        return _four_tap_weights(centers, side)
    # torch leaves out an antialiased pass that keeps the size, whatever the scale factor.
    return np.eye(side) if size == side else _antialiased_weights(centers, step, side)


def _four_tap_weights(centers: np.ndarray, side: int) -> np.ndarray:
    source = centers - 0.5
    first = np.floor(source).astype(int) - 1
    matrix = np.zeros((len(centers), side))
    for tap in range(4):
        index = np.clip(first + tap, 0, side - 1)  # border values repeat
        np.add.at(matrix, (np.arange(len(centers)), index), _cubic(source - (first + tap), a=-0.75))
    return matrix


def _antialiased_weights(centers: np.ndarray, step: float, side: int) -> np.ndarray:
    stretch = max(step, 1.0)  # the kernel widens only when shrinking
    first = np.maximum((centers - 2 * stretch + 0.5).astype(int), 0)
    last = np.minimum((centers + 2 * stretch + 0.5).astype(int), side)
    index = np.arange(side)
    weights = _cubic((index - centers[:, None] + 0.5) / stretch, a=-0.5)
    weights = np.where((index >= first[:, None]) & (index < last[:, None]), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with free parameter `a`."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
