"""Nearest and mutually nearest patches against plain loops."""

import jax
import numpy as np
import pytest

from dinojax import UserError, patches


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def cosine(one, other):
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


@pytest.mark.parametrize("chunk", [None, 1, 5, 23])
def test_mutual_matches_are_those_of_loops(chunk):
    first, second = random(23, 6), random(17, 6, seed=1)
    table = [[cosine(one, other) for other in second] for one in first]
    forward = [max(range(17), key=lambda j, i=i: table[i][j]) for i in range(23)]
    backward = [max(range(23), key=lambda i, j=j: table[i][j]) for j in range(17)]
    expected = {(i, j): table[i][j] for i, j in enumerate(forward) if backward[j] == i}
    with jax.enable_x64(True):
        found = patches.mutual_matches(first, second, chunk=chunk)
    assert 3 < len(expected) < 17
    assert {(int(i), int(j)) for i, j in zip(found.first, found.second)} == expected.keys()
    for i, j, similarity in zip(*found):
        assert similarity == pytest.approx(expected[int(i), int(j)], abs=1e-14)
    assert (np.diff(found.similarity) <= 0).all()


@pytest.mark.parametrize("chunk", [None, 2, 3])
def test_equal_patches_match_at_the_lower_index(chunk):
    first, second = random(2, 4), random(3, 4, seed=1)
    found = patches.mutual_matches(first[[0, 1, 0, 1]], np.concatenate([second, first[[1, 0, 1, 0]]]), chunk=chunk)
    assert {(int(i), int(j)) for i, j in zip(found.first, found.second)} == {(0, 4), (1, 3)}


def test_a_padded_chunk_matches_nothing():
    """All similarities are negative, so that rows of zeros would be the nearest."""
    first, second = np.abs(random(7, 4)), -np.abs(random(5, 4, seed=1))
    whole, chunked = (patches.mutual_matches(first, second, chunk=chunk) for chunk in (7, 4))
    assert len(whole.first) and (whole.similarity < 0).all()
    np.testing.assert_array_equal(whole.first, chunked.first)
    np.testing.assert_array_equal(whole.second, chunked.second)


def test_the_nearest_of_a_bank():
    queries, bank = 3 * random(11, 5).astype(np.float32), random(40, 5, seed=1).astype(np.float32)
    for chunk in (None, 4):
        found = patches.nearest_patches(queries, bank, chunk=chunk)
        for query, index, similarity in zip(queries.astype(float), found.patch, found.similarity):
            table = [cosine(query, one.astype(float)) for one in bank]
            assert index == int(np.argmax(table))
            assert similarity == pytest.approx(max(table), abs=1e-6)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="features of 4 and of 5 numbers cannot be compared"):
        patches.mutual_matches(random(3, 4), random(3, 5))
    with pytest.raises(UserError, match="there are no patches to compare"):
        patches.nearest_patches(random(3, 4), random(0, 4))
