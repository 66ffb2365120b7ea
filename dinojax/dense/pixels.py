"""From scores of patches to a value for every pixel, block by block: memory does not grow with pixels times classes.

A block of 64 × 64 pixels is interpolated from the few patches around it. All blocks have one shape, so that photos of
any size run through one compiled program.

Source: mmsegmentation `EncoderDecoder.inference`: probabilities of several scales are averaged, then the largest is
taken.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from dinojax.dense.resize import bilinear_matrix

_BLOCK = 64  # pixels
_AT_ONCE = 16  # blocks
Scores = Float[Array | np.ndarray, "_rows _columns outputs"]


class _Axis(NamedTuple):
    """The blocks of one side: first patch of each, and the weights "pixels patches" of its patches."""

    starts: tuple[int, ...]
    weights: list[Float[np.ndarray, "_pixels _patches"]]


def class_map(scores: Sequence[Scores], height: int, width: int) -> UInt8[np.ndarray, "{height} {width}"]:
    """The class of the highest score of each pixel; of several scales, of the highest mean probability.

    Args:
        scores: of the same photo, one array for each scale; at most 255 classes.
        height: of the map, in pixels.
        width: of the map, in pixels.
    """
    found = np.empty((height, width), np.uint8)
    _fill(found, scores, partial(_classes, several=len(scores) > 1))
    return found


def depth_map(
    depths: Sequence[Float[Array | np.ndarray, "_rows _columns"]], height: int, width: int
) -> Float[np.ndarray, "{height} {width}"]:
    """The depth of each pixel, the mean over scales; see `class_map`."""
    found = np.empty((height, width), np.float32)
    _fill(found, [np.asarray(depth)[..., None] for depth in depths], _means)
    return found


def _fill(found: np.ndarray, scores: Sequence[Scores], reduce: Callable) -> None:
    """Fills a map with what `reduce` makes of the interpolated scores of each block."""
    planes = [np.ascontiguousarray(np.moveaxis(np.asarray(one, np.float32), -1, 0)) for one in scores]
    axes = [(_axis(found.shape[0], p.shape[1]), _axis(found.shape[1], p.shape[2])) for p in planes]
    places = [(row, column) for row in range(len(axes[0][0].starts)) for column in range(len(axes[0][1].starts))]
    for start in range(0, len(places), _AT_ONCE):
        some = places[start : start + _AT_ONCE]
        padded = some + some[-1:] * (_AT_ONCE - len(some))
        blocks = np.asarray(
            reduce(*zip(*(_inputs(plane, down, across, padded) for plane, (down, across) in zip(planes, axes))))
        )
        for (row, column), block in zip(some, blocks):
            place = found[row * _BLOCK : (row + 1) * _BLOCK, column * _BLOCK : (column + 1) * _BLOCK]
            place[:] = block[: place.shape[0], : place.shape[1]]


def _inputs(plane: np.ndarray, down: _Axis, across: _Axis, places: Sequence[tuple[int, int]]) -> Iterator[np.ndarray]:
    """The patches around some blocks, and the weights of their rows and columns."""
    high, wide = down.weights[0].shape[1], across.weights[0].shape[1]
    yield np.stack([
        plane[:, down.starts[i] : down.starts[i] + high, across.starts[j] : across.starts[j] + wide]
        for i, j in places
    ])  # fmt: skip
    yield np.stack([down.weights[i] for i, _ in places])
    yield np.stack([across.weights[j] for _, j in places])


def _axis(size: int, cells: int) -> _Axis:
    """The blocks of a side of `size` pixels over `cells` patches; the last one is filled up with zeros."""
    matrix = bilinear_matrix(size, cells).astype(np.float32)
    around = min(cells, int(np.ceil(_BLOCK * cells / size)) + 2)
    starts, weights = [], []
    for first in range(0, size, _BLOCK):
        rows = matrix[first : first + _BLOCK]
        start = min(int(rows.any(axis=0).argmax()), cells - around)
        starts.append(start)
        weights.append(np.pad(rows[:, start : start + around], ((0, _BLOCK - len(rows)), (0, 0))))
    return _Axis(tuple(starts), weights)


def _interpolated(planes: Array, down: Array, across: Array) -> Array:
    """ "blocks outputs rows columns" to "outputs blocks pixels pixels"."""
    lines = jnp.einsum("bhr,bkrc->kbhc", down, planes, precision="highest")
    return jnp.einsum("kbhc,bwc->kbhw", lines, across, precision="highest")


@partial(jax.jit, static_argnames="several")
def _classes(planes: Sequence[Array], down: Sequence[Array], across: Sequence[Array], *, several: bool) -> Array:
    total = jnp.zeros(())
    for one in zip(planes, down, across):
        pixels = _interpolated(*one)
        total = (jax.nn.softmax(pixels, axis=0) if several else pixels) + total
    best, found = total[0], jnp.zeros(total.shape[1:], jnp.uint8)
    for index in range(1, len(total)):  # XLA's argmax reads class by class for each pixel, which is slow on a CPU
        better = total[index] > best
        best, found = jnp.where(better, total[index], best), jnp.where(better, jnp.uint8(index), found)
    return found


@jax.jit
def _means(planes: Sequence[Array], down: Sequence[Array], across: Sequence[Array]) -> Array:
    return jnp.stack([_interpolated(*one)[0] for one in zip(planes, down, across)]).mean(axis=0)
