"""Groups of similar images against union-find, written as loops over all pairs."""

import numpy as np
import pytest

from dinojax import UserError
from dinojax.retrieval import similar_groups


def groups_by_loops(features, threshold):
    """Lowest index of each image's group, and its similarity to the most similar other image."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    parent = list(range(len(unit)))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    best = [-np.inf] * len(unit)
    for i in range(len(unit)):
        for j in range(len(unit)):
            if i == j:
                continue
            similarity = float(unit[i] @ unit[j])
            best[i] = max(best[i], similarity)
            if similarity >= threshold:
                low, high = sorted((root(i), root(j)))
                parent[high] = low
    return [root(i) for i in range(len(unit))], best


def clustered(seed, images=60, centres=15, dim=8, noise=0.5):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((centres, dim))[rng.integers(0, centres, images)] + noise * rng.standard_normal(
        (images, dim)
    )


@pytest.mark.parametrize("chunk", [4, 7, 16, 60, 500])
@pytest.mark.parametrize("threshold", [0.75, 0.9, 0.97])
def test_groups_are_those_of_union_find(chunk, threshold):
    sizes = set()
    for seed in range(4):
        features = clustered(seed)
        labels, best = groups_by_loops(features, threshold)
        found = similar_groups(features.astype(np.float32), threshold, chunk=chunk)
        np.testing.assert_array_equal(found.labels, labels)
        np.testing.assert_allclose(found.similarity, best, atol=1e-6)
        sizes |= set(np.unique(labels, return_counts=True)[1])
    assert len(sizes) > 1  # lone images and others


@pytest.mark.parametrize("chunk", [3, 100])
def test_a_chain_is_one_group_though_its_ends_differ(chunk):
    angles = np.deg2rad(np.random.default_rng(0).permutation(np.arange(0, 90, 5)))
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    threshold = float(np.cos(np.deg2rad(5.1)))
    assert (similar_groups(features, threshold, chunk=chunk).labels == 0).all()
    threshold = float(np.cos(np.deg2rad(4.9)))
    np.testing.assert_array_equal(similar_groups(features, threshold, chunk=chunk).labels, np.arange(18))


def test_equal_images_are_found_at_a_threshold_of_one():
    features = np.random.default_rng(1).standard_normal((300, 48)).astype(np.float32)
    features[150:] = 1.7 * features[:150]
    np.testing.assert_array_equal(similar_groups(features, 1.0, chunk=70).labels, np.tile(np.arange(150), 2))


def test_progress_counts_every_pair_once():
    counts = []
    similar_groups(clustered(0).astype(np.float32), 0.9, chunk=13, progress=counts.append)
    assert sum(counts) == 60 * 59 // 2


def test_one_image_is_a_group_without_a_neighbour():
    found = similar_groups(np.ones((1, 3), np.float32), 0.9)
    assert (found.labels, found.similarity) == ([0], [-np.inf])


@pytest.mark.parametrize(
    ("threshold", "value", "message"),
    [
        (0.0, 1.0, "threshold=0.0 is not above 0 and up to 1"),
        (1.1, 1.0, "threshold=1.1 is not above 0 and up to 1"),
        (float("nan"), 1.0, "threshold=nan is not above 0 and up to 1"),
        (0.9, np.inf, r"the features of image 0 are not finite \(inf\)"),
    ],
)
def test_a_mistake_is_one_sentence(threshold, value, message):
    with pytest.raises(UserError, match=message):
        similar_groups(np.full((3, 2), value, np.float32), threshold)
