"""How good a ranking is: average precision with junk images, and the protocols of revisited Oxford and Paris.

A ranking lists images of the bank, best first. For each query an image is positive, negative or junk; junk is neither
rewarded nor punished, as if it were not in the bank.

Source: facebookresearch/dino 7c446df `eval_image_retrieval.py`, whose `compute_map` and `compute_ap` are those of
revisited Oxford and Paris (Radenović et al., 2018, arXiv 1803.11285).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int8

from dinojax.errors import UserError, require

POSITIVE, NEGATIVE, JUNK = 1, 0, -1
# Protocol: the lists whose images are positive, and those whose images are junk.
_PROTOCOLS = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}

Relevance = Int8[np.ndarray, "queries images"]
Ranking = Int[np.ndarray, "rankings ranked"]


class RetrievalScores(NamedTuple):
    """What a ranking reaches, as fractions.

    Attributes:
        mean_average_precision: over the queries that have a positive image.
        mean_precision: the same mean of the precision at each k.
        average_precision: of each query; NaN where it has no positive image.
        precision: of each query at each k.
    """

    mean_average_precision: float
    mean_precision: Float64[np.ndarray, " ks"]
    average_precision: Float64[np.ndarray, " queries"]
    precision: Float64[np.ndarray, "queries ks"]


def revisited_relevance(
    images: int,
    *,
    easy: Sequence[Sequence[int]],
    hard: Sequence[Sequence[int]],
    junk: Sequence[Sequence[int]],
    protocol: Literal["easy", "medium", "hard"],
) -> Relevance:
    """What each image of the bank is to each query in a protocol of revisited Oxford and Paris.

    Easy: easy images are positive, hard and junk ones are junk. Medium: easy and hard images are positive. Hard: hard
    images are positive, easy and junk ones are junk.

    Args:
        images: number of images of the bank.
        easy: for each query, the indices of its easy images.
        hard: for each query, the indices of its hard images.
        junk: for each query, the indices of its junk images.
        protocol: which images are positive.

    Raises:
        UserError: an unknown protocol, lists of several lengths, or an index that is out of range or given twice.
    """
    require(protocol in _PROTOCOLS, "protocol", protocol, " or ".join(_PROTOCOLS))
    lists = {"easy": easy, "hard": hard, "junk": junk}
    if len({len(one) for one in lists.values()}) > 1:
        counts = ", ".join(f"{len(one)} {name}" for name, one in lists.items())
        raise UserError(f"the lists are of different numbers of queries ({counts}); give one list for each query")
    values = dict.fromkeys(_PROTOCOLS[protocol][0], POSITIVE) | dict.fromkeys(_PROTOCOLS[protocol][1], JUNK)
    relevance = np.full((len(easy), images), NEGATIVE, np.int8)
    for query in range(len(easy)):
        given = [np.asarray(one[query], np.int64).reshape(-1) for one in lists.values()]
        _check_indices(np.concatenate(given), images, query)
        for name, indices in zip(lists, given):
            relevance[query, indices] = values[name]
    return relevance


def average_precision(ranking: Ranking, relevance: Relevance) -> Float64[np.ndarray, " queries"]:
    """The area under the precision-recall curve of each query, by trapezoids; NaN where it has no positive image.

    Junk is taken out of the ranking first. If the n positive images then stand at the places r₀ < r₁ < …, counted from
    0, the average precision is the sum over j of (p + q) / 2n, where p = j / rⱼ is the precision before the place (1 at
    rⱼ = 0) and q = (j + 1) / (rⱼ + 1) is that after it. Positive images that are not ranked add nothing.

    Args:
        ranking: indices of the bank, best first; the whole bank or its beginning.
        relevance: 1 for positive images, 0 for negative ones, -1 for junk.

    Raises:
        UserError: an index that is out of range or ranked twice, or another value in `relevance`.
    """
    positive, place, order = _places(ranking, relevance)
    before = np.where(place == 0, 1.0, order / np.maximum(place, 1))
    after = (order + 1) / np.maximum(place + 1, 1)
    area = np.where(positive, (before + after) / 2, 0).sum(axis=1)
    totals = (relevance == POSITIVE).sum(axis=1)
    return np.where(totals > 0, area / np.maximum(totals, 1), np.nan)


def precision_at(ranking: Ranking, relevance: Relevance, ks: Sequence[int]) -> Float64[np.ndarray, "queries ks"]:
    """The share of positive images among the first k, without junk; NaN where a query has no positive image.

    As in the official protocol, k is at most the place of the last positive image, counted from 1: where all positive
    images are ranked first, the precision is 1 at any k. A query none of whose positive images is ranked has 0.

    Raises:
        UserError: a k that is not positive, or what `average_precision` refuses.
    """
    for k in ks:
        require(k >= 1, "k", k, "a positive number of images")
    positive, place, _ = _places(ranking, relevance)
    last = np.where(positive, place + 1, 0).max(axis=1, initial=0)
    result = np.empty((len(ranking), len(ks)))
    for column, k in enumerate(ks):
        first = np.minimum(last, k)
        result[:, column] = (positive & (place < first[:, None])).sum(axis=1) / np.maximum(first, 1)
    return np.where((relevance == POSITIVE).any(axis=1)[:, None], result, np.nan)


def retrieval_scores(ranking: Ranking, relevance: Relevance, ks: Sequence[int] = (1, 5, 10)) -> RetrievalScores:
    """Average precision and precision at k of each query, and their means over the queries with a positive image.

    `nearest(bank, queries, k=len(bank))` gives the ranking.

    Raises:
        UserError: no query has a positive image, or what `average_precision` and `precision_at` refuse.
    """
    if not (relevance == POSITIVE).any():
        raise UserError("no query has a positive image in this protocol; a mean needs one or more")
    areas, precision = average_precision(ranking, relevance), precision_at(ranking, relevance, ks)
    return RetrievalScores(float(np.nanmean(areas)), np.nanmean(precision, axis=0), areas, precision)


def _places(ranking: Ranking, relevance: Relevance) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether each ranked image is positive, its place among those that are not junk, and its number among positives.

    Both count from 0, and mean something only at positive images.
    """
    queries, images = relevance.shape
    if len(ranking) != queries:
        raise UserError(f"{len(ranking)} rankings do not fit the relevance of {queries} queries")
    if not np.isin(relevance, (POSITIVE, NEGATIVE, JUNK)).all():
        raise UserError("relevance holds a value other than 1 (positive), 0 (negative) and -1 (junk)")
    for query, row in enumerate(ranking):
        _check_indices(row, images, query)
    ranked = np.take_along_axis(relevance, ranking, axis=1)
    positive = ranked == POSITIVE
    return positive, np.cumsum(ranked != JUNK, axis=1) - 1, np.cumsum(positive, axis=1) - 1


def _check_indices(indices: np.ndarray, images: int, query: int) -> None:
    """Refuses indices that are not of the bank, and repeated ones, which would be counted twice."""
    outside = indices[(indices < 0) | (indices >= images)]
    if len(outside):
        raise UserError(f"image {outside[0]} of query {query} is not between 0 and {images - 1}")
    counts = np.bincount(indices, minlength=1)
    if counts.max() > 1:
        raise UserError(f"image {counts.argmax()} of query {query} is given twice; give each image once")
