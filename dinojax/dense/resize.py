"""Bilinear interpolation from patches to pixels: half-pixel centres, not antialiased.

Source: PyTorch `F.interpolate(mode="bilinear", align_corners=False)`.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def bilinear_matrix(size: int, cells: int) -> Float[np.ndarray, "{size} {cells}"]:
    """The weights of `cells` values in each of `size` interpolated ones, as a matrix in float64."""
    position = np.maximum((np.arange(size) + 0.5) * cells / size - 0.5, 0)
    first = np.minimum(position.astype(int), cells - 1)
    share = position - first
    matrix = np.zeros((size, cells))
    np.add.at(matrix, (np.arange(size), first), 1 - share)
    np.add.at(matrix, (np.arange(size), np.minimum(first + 1, cells - 1)), share)
    return matrix


def resize_bilinear(
    maps: Float[Array, "batch rows columns channels"], height: int, width: int
) -> Float[Array, "batch {height} {width} channels"]:
    """Maps interpolated to `height` × `width`."""
    down, across = (
        jnp.asarray(bilinear_matrix(size, cells), maps.dtype) for size, cells in zip((height, width), maps.shape[1:3])
    )
    lines = jnp.einsum("hr,brck->bhck", down, maps, precision="highest")
    return jnp.einsum("wc,bhck->bhwk", across, lines, precision="highest")
