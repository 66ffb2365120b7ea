"""Exact search against one large product and a stable sort."""

import numpy as np
import pytest

from dinojax import UserError
from dinojax.retrieval import nearest


def random_features(images, dim, seed):
    return np.random.default_rng(seed).standard_normal((images, dim)).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_a_search_in_chunks_is_one_product_and_a_stable_sort(chunk):
    bank, queries = random_features(50, 24, 0), random_features(9, 24, 1)
    bank[31], bank[44] = bank[6], 3 * bank[6]  # equal directions
    queries[0] = bank[6]
    similarities, indices = nearest(bank, queries, 50, chunk=chunk)
    unit = [array / np.linalg.norm(array.astype(np.float64), axis=1, keepdims=True) for array in (bank, queries)]
    expected = unit[1] @ unit[0].T
    np.testing.assert_allclose(np.take_along_axis(expected, indices, axis=1), similarities, atol=1e-6)
    order = np.argsort(-expected.round(5), axis=1, kind="stable")  # equal up to the rounding of float32
    np.testing.assert_allclose(np.take_along_axis(expected, order, axis=1), similarities, atol=1e-5)
    assert all(set(row) == set(range(50)) for row in indices)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_ties_go_to_the_lower_index(chunk):
    rng = np.random.default_rng(2)
    bank = (np.eye(6)[rng.integers(0, 6, 100)] * rng.choice([-1, 1], (100, 1))).astype(np.float32)
    queries = np.eye(6, dtype=np.float32)  # similarities are exactly 0, 1 or -1
    _, indices = nearest(bank, queries, 40, chunk=chunk)
    np.testing.assert_array_equal(indices, np.argsort(-(queries @ bank.T), axis=1, kind="stable")[:, :40])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": np.zeros((0, 4), np.float32)}, "there are no queries to search for"),
        ({"queries": np.zeros((2, 3), np.float32)}, "queries of 3 numbers cannot be compared with a bank of 4"),
        ({"k": 0}, "k=0 is not between 1 and the 10 images of the bank"),
        ({"k": 11}, "k=11 is not between 1 and the 10 images of the bank"),
        ({"chunk": 0}, "chunk=0 is not a positive number of images"),
        ({"bank": np.full((10, 4), np.nan, np.float32)}, r"the features of image 0 are not finite \(nan\)"),
    ],
)
def test_what_no_search_answers_is_refused(change, message):
    given = {"bank": random_features(10, 4, 0), "queries": random_features(2, 4, 1), "k": 3} | change
    with pytest.raises(UserError, match=message):
        nearest(**given)
