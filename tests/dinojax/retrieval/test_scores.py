"""Average precision and precision at k against plain loops, written from the protocol's formula."""

import math

import numpy as np
import pytest

from dinojax import UserError
from dinojax.retrieval import average_precision, precision_at, retrieval_scores, revisited_relevance


def without_junk(ranking, positive, junk):
    """The places of the positive images, counted from 0, after junk was taken out."""
    kept = [image for image in ranking if image not in junk]
    return [place for place, image in enumerate(kept) if image in positive]


def average_precision_by_loops(ranking, positive, junk):
    if not positive:
        return math.nan
    total = 0.0
    for found, place in enumerate(without_junk(ranking, positive, junk)):
        before = 1.0 if place == 0 else found / place
        after = (found + 1) / (place + 1)
        total += (before + after) / 2 * (1 / len(positive))
    return total


def precision_by_loops(ranking, positive, junk, k):
    if not positive:
        return math.nan
    places = [place + 1 for place in without_junk(ranking, positive, junk)]
    if not places:
        return 0.0
    first = min(max(places), k)
    return sum(place <= first for place in places) / first


def drawn(seed, queries=12, images=40):
    """Rankings, and disjoint easy, hard and junk lists, some of them empty."""
    rng = np.random.default_rng(seed)
    rankings = np.stack([rng.permutation(images) for _ in range(queries)])
    lists = {"easy": [], "hard": [], "junk": []}
    for _ in range(queries):
        order = rng.permutation(images)
        cuts = np.sort(rng.integers(0, images // 2, 3)) * rng.integers(0, 2)
        for name, part in zip(lists, np.split(order, cuts)):
            lists[name].append(part.tolist())
    return rankings, lists


@pytest.mark.parametrize("protocol", ["easy", "medium", "hard"])
@pytest.mark.parametrize("ranked", [40, 15, 1])
def test_scores_equal_loops_over_the_ranking(protocol, ranked):
    positives = {"easy": ("easy",), "medium": ("easy", "hard"), "hard": ("hard",)}[protocol]
    junks = {"easy": ("junk", "hard"), "medium": ("junk",), "hard": ("junk", "easy")}[protocol]
    nans = 0
    for seed in range(5):
        rankings, lists = drawn(seed)
        rankings = rankings[:, :ranked]
        relevance = revisited_relevance(40, **lists, protocol=protocol)
        found = retrieval_scores(rankings, relevance, ks=(1, 5, 10, 100))
        areas, precisions = [], []
        for query, ranking in enumerate(rankings.tolist()):
            positive, junk = ({i for name in names for i in lists[name][query]} for names in (positives, junks))
            areas.append(average_precision_by_loops(ranking, positive, junk))
            precisions.append([precision_by_loops(ranking, positive, junk, k) for k in (1, 5, 10, 100)])
        np.testing.assert_allclose(found.average_precision, areas, rtol=1e-12)
        np.testing.assert_allclose(found.precision, precisions, rtol=1e-12)
        asked = [i for i, area in enumerate(areas) if not math.isnan(area)]
        nans += len(areas) - len(asked)
        mean = sum(areas[i] for i in asked) / len(asked)
        assert found.mean_average_precision == pytest.approx(mean, rel=1e-12)
        for column in range(4):
            mean = sum(precisions[i][column] for i in asked) / len(asked)
            assert found.mean_precision[column] == pytest.approx(mean, rel=1e-12)
    assert nans  # queries without a positive image were among them


def test_a_ranking_by_hand():
    """Positive, junk, negative, positive: without junk the places are 0 and 2."""
    relevance = np.array([[1, -1, 0, 1]], np.int8)
    ranking = np.arange(4)[None]
    assert average_precision(ranking, relevance) == pytest.approx([((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2) / 2])
    np.testing.assert_allclose(precision_at(ranking, relevance, (1, 2, 9)), [[1, 1 / 2, 2 / 3]])


def test_a_perfect_ranking_has_precision_one_at_any_k():
    relevance = np.array([[0, 1, -1, 1]], np.int8)
    found = retrieval_scores(np.array([[2, 1, 3, 0]]), relevance, ks=(1, 10))
    assert found.mean_average_precision == 1 and (found.mean_precision == 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval_scores(np.array([[0, 1]]), np.array([[0, -1]], np.int8)), "no query has a positive image"),
        (lambda: average_precision(np.array([[0, 0]]), np.array([[1, 0]], np.int8)), "image 0 .* is given twice"),
        (lambda: average_precision(np.array([[0, 2]]), np.array([[1, 0]], np.int8)), "image 2 of query 0 is not"),
        (lambda: average_precision(np.array([[0, 1]]), np.array([[1, 3]], np.int8)), "a value other than 1"),
        (lambda: average_precision(np.array([[0], [1]]), np.array([[1, 0]], np.int8)), "2 rankings do not fit"),
        (lambda: precision_at(np.array([[0]]), np.array([[1]], np.int8), (0,)), "k=0 is not a positive number"),
        (lambda: revisited_relevance(3, easy=[[0]], hard=[[0]], junk=[[]], protocol="easy"), "is given twice"),
        (lambda: revisited_relevance(3, easy=[[3]], hard=[[]], junk=[[]], protocol="easy"), "image 3 of query 0"),
        (lambda: revisited_relevance(3, easy=[[0]], hard=[], junk=[[]], protocol="easy"), "1 easy, 0 hard, 1 junk"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(call, message):
    with pytest.raises(UserError, match=message):
        call()
