"""Pooling and whitening against loops and algebra."""

import jax
import numpy as np
import pytest

from dinojax import UserError
from dinojax.retrieval import copy_features, fit_whitening, gem, nearest, whiten


def random(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("p", [1.0, 3.0, 4.0])
def test_the_generalised_mean_is_that_of_loops(p):
    patches = random((3, 5, 4))
    expected = np.empty((3, 4))
    for image in range(3):
        for dim in range(4):
            powers = [max(float(patches[image, patch, dim]), 1e-6) ** p for patch in range(5)]
            expected[image, dim] = (sum(powers) / 5) ** (1 / p)
    np.testing.assert_allclose(jax.jit(gem, static_argnames="p")(patches, p=p), expected, rtol=1e-5)


def test_features_are_the_class_token_then_the_pooled_patches():
    cls, patches = random((3, 4)), random((3, 5, 4), 1)
    found = jax.jit(copy_features)(cls, patches)
    assert found.shape == (3, 8)
    np.testing.assert_array_equal(found[:, :4], cls)
    np.testing.assert_allclose(found[:, 4:], gem(patches, p=4.0), rtol=1e-6)


def covariance_by_loops(features):
    images, dim = features.shape
    mean = [sum(float(x[i]) for x in features) / images for i in range(dim)]
    return mean, np.array(
        [
            [sum((float(x[i]) - mean[i]) * (float(x[j]) - mean[j]) for x in features) / images for j in range(dim)]
            for i in range(dim)
        ]
    )


def test_whitened_products_are_those_of_the_inverse_covariance():
    """Signs and the order of equal directions are free, but (x − m)ᵀ C⁻¹ (y − m) is not."""
    mixed = np.eye(6, dtype=np.float32) + 0.3 * random((6, 6), 3)
    others, features = random((200, 6), 2) @ mixed + 5, random((9, 6), 4) + 5
    found = whiten(features, fit_whitening(others)).astype(np.float64)
    mean, covariance = covariance_by_loops(others)
    centred = features - np.array(mean)
    expected = centred @ np.linalg.solve(covariance, centred.T)
    np.testing.assert_allclose(found @ found.T, expected, rtol=2e-6, atol=1e-5)  # 2.8e-7 and 2e-6 of 44 measured
    whitened = whiten(others, fit_whitening(others))
    np.testing.assert_allclose(covariance_by_loops(whitened)[1], np.eye(6), atol=1e-7)  # 9e-9 measured


def test_the_largest_variance_comes_first_and_flat_directions_are_not_blown_up():
    rng = np.random.default_rng(5)
    features = np.zeros((500, 4), np.float32)
    features[:, 2], features[:, 0] = 3 * rng.standard_normal(500), rng.standard_normal(500)
    whitening = fit_whitening(features, dim=2)
    assert whitening.projection.shape == (2, 4)
    np.testing.assert_array_equal(np.abs(whitening.projection).argmax(axis=1), [2, 0])
    whole = fit_whitening(features)
    largest = features[:, 2].var()  # of the coordinate, which is the first direction but for 1.4e-5, as measured
    np.testing.assert_allclose(np.linalg.norm(whole.projection[2:], axis=1), 1 / np.sqrt(1e-5 * largest), rtol=1e-4)


def test_whitening_finds_what_a_common_direction_hides():
    """All images share one strong direction, and differ in weak ones, along which the copies are found."""
    rng = np.random.default_rng(6)
    scales = np.array([30.0] + [0.3] * 7)

    def images(count):
        return (scales * rng.standard_normal((count, 8))).astype(np.float32)

    bank, others = images(40), images(300)
    copies = bank.copy()
    copies[:, 0] = images(40)[:, 0]
    whitening = fit_whitening(others)
    found = nearest(whiten(bank, whitening)[:, 1:], whiten(copies, whitening)[:, 1:], 1)[1][:, 0]
    np.testing.assert_array_equal(found, np.arange(40))
    assert (nearest(bank, copies, 1)[1][:, 0] == np.arange(40)).mean() < 0.5


@pytest.mark.parametrize(
    ("features", "dim", "message"),
    [
        (random((1, 3)), None, "1 images that do not differ"),
        (np.ones((5, 3), np.float32), None, "5 images that do not differ"),
        (random((5, 3)), 4, "dim=4 is not between 1 and the 3 dimensions"),
        (np.full((5, 3), np.nan, np.float32), None, "not finite"),
    ],
)
def test_what_cannot_be_whitened_is_refused(features, dim, message):
    with pytest.raises(UserError, match=message):
        fit_whitening(features, dim=dim)
