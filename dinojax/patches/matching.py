"""Nearest patches by cosine similarity, and pairs of patches of two images that are each other's nearest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dinojax.errors import UserError, require
from dinojax.precision import at_least_float32

# Similarities that are in memory at once: 64 MiB of float32.
_SIMILARITIES = 2**24


class Matches(NamedTuple):
    """Pairs of patches, the most similar first.

    Attributes:
        first: patch of the first image, in row-major order.
        second: patch of the second image.
        similarity: their cosine similarity.
    """

    first: Int[np.ndarray, " matches"]
    second: Int[np.ndarray, " matches"]
    similarity: Float[np.ndarray, " matches"]


def mutual_matches(
    first: Float[Array | np.ndarray, "first dim"],
    second: Float[Array | np.ndarray, "second other_dim"],
    *,
    chunk: int | None = None,
) -> Matches:
    """The pairs of patches of which each is the nearest of the other by cosine similarity; ties go to the lower index.

    Args:
        first: patch features of an image, of any length.
        second: patch features of another image.
        chunk: patches of the first image that are compared at once. None takes as many as 64 MiB hold.

    Raises:
        UserError: an image without patches, or features of two widths.
    """
    forward, backward = _both_ways(first, second, chunk)
    indices = np.arange(len(first))
    mutual = backward.patch[forward.patch] == indices
    kept = indices[mutual]
    order = kept[np.argsort(-forward.similarity[mutual], kind="stable")]
    return Matches(order, forward.patch[order], forward.similarity[order])


class Nearest(NamedTuple):
    """The nearest patch of each query, and its cosine similarity."""

    similarity: Float[np.ndarray, " queries"]
    patch: Int[np.ndarray, " queries"]


def nearest_patches(
    queries: Float[Array | np.ndarray, "queries dim"],
    bank: Float[Array | np.ndarray, "bank bank_dim"],
    *,
    chunk: int | None = None,
) -> Nearest:
    """The patch of the bank with the highest cosine similarity to each query; ties go to the lower index.

    Raises:
        UserError: no queries, an empty bank, or features of two widths.
    """
    _check(queries, bank, chunk)
    rows = _rows(len(queries), len(bank), chunk)
    similarity, index = _nearest(_padded(queries, rows), unit(jnp.asarray(bank)))
    return Nearest(*(np.asarray(x).ravel()[: len(queries)] for x in (similarity, index)))


def unit(features: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Features of length 1, in float32 at least; zeros stay zeros."""
    features = features.astype(at_least_float32(features.dtype))
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


def _both_ways(first, second, chunk: int | None) -> tuple[Nearest, Nearest]:
    _check(first, second, chunk)
    rows = _rows(len(first), len(second), chunk)
    found = _nearest_both_ways(_padded(first, rows), unit(jnp.asarray(second)), len(first))
    forward, backward = (tuple(map(np.asarray, one)) for one in found)
    return Nearest(*(x.ravel()[: len(first)] for x in forward)), Nearest(*backward)


def _check(first, second, chunk: int | None) -> None:
    if not len(first) or not len(second):
        raise UserError("there are no patches to compare; give an image of one patch or more")
    if first.shape[1] != second.shape[1]:
        raise UserError(
            f"features of {first.shape[1]} and of {second.shape[1]} numbers cannot be compared; compute both with the "
            "same model"
        )
    require(chunk is None or chunk >= 1, "chunk", chunk, "a positive number of patches")


def _rows(queries: int, bank: int, chunk: int | None) -> int:
    """Rows of a chunk, such that the chunks are about equally long."""
    chunk = chunk or max(1, _SIMILARITIES // bank)
    return -(-queries // -(-queries // chunk))


def _padded(features, rows: int) -> Array:
    """Features of length 1 in chunks, "chunks rows dim", the last one filled up with zeros."""
    features = unit(jnp.asarray(features))
    return jnp.pad(features, ((0, -len(features) % rows), (0, 0))).reshape(-1, rows, features.shape[1])


@jax.jit
def _nearest(chunks: Float[Array, "chunks rows dim"], bank: Float[Array, "bank dim"]) -> tuple[Array, Array]:
    return jax.lax.map(lambda part: _largest(_similarities(part, bank), 1), chunks)


@jax.jit
def _nearest_both_ways(chunks: Float[Array, "chunks rows dim"], second: Float[Array, "second dim"], count: Array):
    """For each row the nearest of `second`, and for each of `second` the nearest of the first `count` rows."""
    rows = chunks.shape[1]
    start = jnp.full(len(second), -jnp.inf, second.dtype), jnp.zeros(len(second), jnp.int32)

    def step(best, part):
        chunk, first_row = part
        similarities = _similarities(chunk, second)
        there = first_row + jnp.arange(rows) < count
        value, index = _largest(jnp.where(there[:, None], similarities, -jnp.inf), 0)
        better = value > best[0]  # not of equal ones: earlier rows have lower indices
        best = jnp.where(better, value, best[0]), jnp.where(better, first_row + index, best[1])
        return best, _largest(similarities, 1)

    backward, forward = jax.lax.scan(step, start, (chunks, rows * jnp.arange(len(chunks), dtype=jnp.int32)))
    return forward, backward


def _similarities(part: Float[Array, "rows dim"], bank: Float[Array, "bank dim"]) -> Float[Array, "rows bank"]:
    return jnp.matmul(part, bank.T, precision="highest")


def _largest(values: Float[Array, "rows columns"], axis: int) -> tuple[Array, Array]:
    """The largest value along an axis, and the lowest index that has it.

    Two plain reductions: XLA does not vectorise the one of pairs that `jnp.argmax` is on a CPU.
    """
    largest = values.max(axis=axis, keepdims=True)
    indices = jax.lax.broadcasted_iota(jnp.int32, values.shape, axis)
    index = jnp.where(values == largest, indices, values.shape[axis]).min(axis=axis)
    return largest.squeeze(axis), jnp.minimum(index, values.shape[axis] - 1)  # of values that are not numbers: the last
