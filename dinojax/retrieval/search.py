"""Exact search: the images of a bank that are most similar to a query."""

import numpy as np
from jaxtyping import Array, Float, Int

from dinojax.errors import UserError, require
from dinojax.probes.neighbours import nearest_neighbours


def nearest(
    bank: Float[Array | np.ndarray, "images dim"],
    queries: Float[Array | np.ndarray, "queries query_dim"],
    k: int,
    *,
    chunk: int = 65_536,
) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
    """The `k` images of the bank with the highest cosine similarity to each query, best first, ties by lower index.

    Every image is compared, in float32. The bank goes through the device in chunks, so it may be a memory map that is
    larger than the device's memory.

    Args:
        bank: features of any length.
        queries: features of any length, from the same model.
        k: images per query.
        chunk: most images on the device at once.

    Returns:
        Cosine similarities, and indices of the bank.

    Raises:
        UserError: there are no queries, `k` is not between 1 and the number of images, the features are of two widths,
            or a feature is not finite.
    """
    check_queries(bank, queries)
    require(1 <= k <= len(bank), "k", k, f"between 1 and the {len(bank):,} images of the bank")
    require(chunk >= 1, "chunk", chunk, "a positive number of images")
    return nearest_neighbours(bank, queries, k, chunk=chunk)


def check_queries(bank: Array | np.ndarray, queries: Array | np.ndarray) -> None:
    """Refuses queries that cannot be compared with a bank.

    Raises:
        UserError: there are no queries, or the features are of two widths.
    """
    if not len(queries):
        raise UserError("there are no queries to search for; give one or more")
    if queries.shape[1] != bank.shape[1]:
        raise UserError(
            f"queries of {queries.shape[1]} numbers cannot be compared with a bank of {bank.shape[1]}; compute both "
            "with the same model"
        )
