"""The rotary position embedding of DINOv3: queries and keys of patches are rotated by angles that tell their position.

A patch has two coordinates, those of its centre, from -1 (top, left) to 1 (bottom, right) on each axis separately, so
that images of any size span the same range. The channels of a head form pairs, channel i with channel i + half. The
first half of the pairs turns with the row, the second half with the column, each pair with a period of its own. Class
token and registers have no position and are not rotated.

Source: arXiv 2508.10104; `modeling_dinov3_vit.py` of Hugging Face's transformers 5.24 (Apache-2.0).
"""

import functools
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from dinojax.precision import at_least_float32

Periods = Literal["float32", "bfloat16"]


class Rotation(NamedTuple):
    """The factors of `rotate`. Those of class token and registers are 1 and 0, which leave a token as it is.

    `sin` has its sign changed in the first half of the channels.
    """

    cos: Float[Array, "tokens head_dim"]
    sin: Float[Array, "tokens head_dim"]


def periods(head_dim: int, base: float, rounded_to: Periods = "float32") -> Float[np.ndarray, " pairs"]:
    """The periods of the pairs of one axis, head_dim / 4 of them, from 1 to nearly `base`; coordinates span 2.

    Args:
        head_dim: number of channels of a head, a multiple of 4.
        base: what the periods rise to.
        rounded_to: "bfloat16" rounds them as Meta's own files store them, by up to 0.4 %; `transformers` does not.
    """
    exact = base ** (np.arange(0, head_dim, 4) / head_dim)
    return exact.astype(jnp.bfloat16).astype(np.float64) if rounded_to == "bfloat16" else exact


def rotation(
    rows: int,
    columns: int,
    head_dim: int,
    *,
    unrotated: int,
    base: float,
    rounded_to: Periods = "float32",
    dtype: DTypeLike = jnp.float32,
) -> Rotation:
    """The rotation of `unrotated` tokens and `rows` · `columns` patches behind them, in row-major order.

    Args:
        rows: patches from top to bottom.
        columns: patches from left to right.
        head_dim: number of channels of a head, a multiple of 4.
        unrotated: number of tokens in front of the patches.
        base: see `periods`.
        rounded_to: see `periods`.
        dtype: dtype of the factors, which are computed in float64.
    """
    angles = np.pad(_angles(rows, columns, head_dim, base, rounded_to), ((unrotated, 0), (0, 0)))
    cos, sin = np.cos(angles), np.sin(angles)
    return Rotation(*(jnp.asarray(np.concatenate(pair, 1), dtype) for pair in ((cos, cos), (-sin, sin))))


def rotate(x: Float[Array, "batch heads tokens head_dim"], by: Rotation) -> Float[Array, "batch heads tokens head_dim"]:
    """Queries or keys rotated: (a, b) → (a cos - b sin, b cos + a sin) for a the first and b the second half.

    Computed in float32 at least, and returned in the dtype of `x`.
    """
    wide = x.astype(at_least_float32(x.dtype))
    swapped = jnp.roll(wide, wide.shape[-1] // 2, axis=-1)
    return (wide * by.cos[None, None] + swapped * by.sin[None, None]).astype(x.dtype)


@functools.lru_cache(maxsize=64)
def _angles(rows: int, columns: int, head_dim: int, base: float, rounded_to: Periods) -> np.ndarray:
    """Radians of each pair of each patch, "patches pairs": the pairs of the row, then those of the column."""
    grid = np.meshgrid(_centers(rows), _centers(columns), indexing="ij")
    turns = np.stack(grid, axis=-1)[..., None] / periods(head_dim, base, rounded_to)
    return 2 * np.pi * turns.reshape(rows * columns, head_dim // 2)


def _centers(count: int) -> np.ndarray:
    """Centres of patches side by side, on an axis from -1 to 1."""
    return (2 * np.arange(count) + 1) / count - 1
