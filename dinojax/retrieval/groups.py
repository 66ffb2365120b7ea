"""Groups of near-duplicates: connected components of the graph of similar images, exact, in bounded memory."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dinojax.errors import require
from dinojax.probes.labelled import check_finite
from dinojax.probes.neighbours import unit_length

_ROUNDING = 1e-6  # of a cosine in float32: equal vectors count as equal at a threshold of 1


class Groups(NamedTuple):
    """Groups of similar images.

    Attributes:
        labels: lowest index in the group of each image. An image without a similar one is a group of its own.
        similarity: of each image to the most similar other one; -inf of a single image.
    """

    labels: Int[np.ndarray, " images"]
    similarity: Float[np.ndarray, " images"]


def similar_groups(
    features: Float[Array | np.ndarray, "images dim"],
    threshold: float,
    *,
    chunk: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> Groups:
    """Groups in which every image has a cosine similarity of at least `threshold` to another one of its group.

    They are the connected components of all pairs at or above the threshold, so the ends of a chain may be less similar
    to each other. All pairs are compared, in float32, one block of `chunk` × `chunk` at a time: memory grows with the
    number of images, not with that of pairs.

    Args:
        features: of any length.
        threshold: above 0, up to 1. Similarities may fall below it by 1e-6, which is what float32 leaves.
        chunk: images on each side of a block.
        progress: called with the number of pairs of images after each block.

    Raises:
        UserError: a threshold or chunk out of range, or a feature that is not finite.
    """
    require(bool(0 < threshold <= 1), "threshold", threshold, "above 0 and up to 1")
    require(chunk >= 1, "chunk", chunk, "a positive number of images")
    check_finite(features)
    total = len(features)
    chunk = min(chunk, max(total, 1))
    labels, similarity = np.arange(total), np.full(total, -np.inf, np.float32)
    for start in range(0, total, chunk):
        rows = _block(features, labels, start, chunk)
        for other in range(start, total, chunk):
            columns = _block(features, labels, other, chunk)
            linked, by_row, by_column = _compare(*rows, *columns, start, other, total, threshold - _ROUNDING)
            linked = np.asarray(linked)
            if linked.any():
                first, second = np.nonzero(linked)
                labels = _merge(labels, first + start, second + other)
                rows = _block(features, labels, start, chunk)
            for place, found in ((start, by_row), (other, by_column)):
                here = similarity[place : place + chunk]
                np.maximum(here, np.asarray(found)[: len(here)], out=here)
            if progress:
                sides = [min(chunk, total - place) for place in (start, other)]
                progress(sides[0] * (sides[0] - 1) // 2 if start == other else sides[0] * sides[1])
    return Groups(labels, similarity)


def _block(features: Array | np.ndarray, labels: np.ndarray, start: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """The features and labels of one chunk, padded to its whole length."""
    part = np.asarray(features[start : start + chunk], np.float32)
    missing = chunk - len(part)
    return np.pad(part, ((0, missing), (0, 0))), np.pad(labels[start : start + chunk], (0, missing)).astype(np.int32)


@jax.jit
def _compare(
    rows: Array,
    row_labels: Array,
    columns: Array,
    column_labels: Array,
    start: Array,
    other: Array,
    total: Array,
    threshold: Array,
) -> tuple[Array, ...]:
    """Which pairs join two groups; then the largest similarity of each row, and of each column.

    Pairs within one group are left out, so that their number stays small where many images are alike.
    """
    similarity = jnp.matmul(unit_length(rows), unit_length(columns).T, precision="highest")
    i, j = start + jnp.arange(len(rows)), other + jnp.arange(len(columns))
    pairs = (i[:, None] != j[None]) & (i < total)[:, None] & (j < total)[None]
    similarity = jnp.where(pairs, similarity, -jnp.inf)
    linked = (similarity >= threshold) & (row_labels[:, None] != column_labels[None])
    return linked, similarity.max(1), similarity.max(0)


def _merge(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The labels after images `first` and `second` were joined pair by pair."""
    total = len(labels)
    edges = coo_array((np.ones(len(first), bool), (labels[first], labels[second])), shape=(total, total))
    component = connected_components(edges, directed=False)[1][labels]
    lowest = np.full(total, total)
    np.minimum.at(lowest, component, np.arange(total))
    return lowest[component]
