"""Bilinear resizing of maps, with the two conventions of `torch.nn.functional.interpolate`.

Source: PyTorch `area_pixel_compute_source_index`, ATen/native/UpSample.h.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def resize_bilinear(
    maps: Float[Array, "batch rows columns channels"],
    size: tuple[int, int],
    *,
    align_corners: bool,
    scale: float | None = None,
) -> Float[Array, "batch new_rows new_columns channels"]:
    """Maps at another size, without smoothing.

    Args:
        maps: channels last.
        size: rows and columns of the result.
        align_corners: whether the centres of the corner pixels stay where they are; otherwise the outer edges do.
        scale: how many new pixels an old one becomes; None is new by old size. It is for torch's `scale_factor` of
            results whose size was rounded, and without aligned corners.
    """
    for axis, length in zip((1, 2), size):
        if length != maps.shape[axis] or scale not in (None, 1):
            maps = _along(maps, axis, length, align_corners, scale)
    return maps


def _along(maps: Array, axis: int, length: int, align_corners: bool, scale: float | None) -> Array:
    """Each line of the result is a mean of two lines of `maps`: gathering both costs less than a matrix product."""
    old = maps.shape[axis]
    target = np.arange(length, dtype=np.float64)
    if align_corners:
        source = target * ((old - 1) / (length - 1) if length > 1 else 0.0)
    else:
        source = np.maximum((target + 0.5) * (1 / scale if scale else old / length) - 0.5, 0.0)
    first = np.minimum(source.astype(np.int64), old - 1)
    second = np.minimum(first + 1, old - 1)
    weight = jnp.asarray(source - first, maps.dtype).reshape([-1 if i == axis else 1 for i in range(4)])
    return jnp.take(maps, first, axis) * (1 - weight) + jnp.take(maps, second, axis) * weight
