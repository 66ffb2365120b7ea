"""Splits, and the linear probe against algebra and scikit-learn."""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression

from dinojax import probes as probe


def random_features(images, dim, seed):
    return np.random.default_rng(seed).standard_normal((images, dim)).astype(np.float32)


@pytest.fixture
def blobs():
    """Three Gaussian blobs that overlap a little, in features of very unequal scale."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 1200)
    centres = 0.7 * rng.standard_normal((3, 8))
    features = (centres[labels] + rng.standard_normal((1200, 8))) * np.logspace(-2, 2, 8) + np.linspace(-5, 50, 8)
    return features.astype(np.float32), labels


def test_subset_keeps_the_proportions_and_every_class():
    labels = np.repeat([0, 1, 2, 3], [600, 300, 99, 1])
    chosen = probe.stratified_subset(labels, 100, seed=0)
    assert len(set(chosen)) == 100
    assert (np.abs(np.bincount(labels[chosen]) - [60, 30, 9.9, 0.1]) <= 1).all()
    assert labels[chosen].max() == 3
    np.testing.assert_array_equal(chosen, probe.stratified_subset(labels, 100, seed=0))
    assert set(chosen) != set(probe.stratified_subset(labels, 100, seed=1))
    np.testing.assert_array_equal(probe.stratified_subset(labels, 1000, seed=5), np.arange(1000))
    for count in (3, 1001):
        with pytest.raises(ValueError, match=f"count={count}"):
            probe.stratified_subset(labels, count, seed=0)


def test_heldout_images_are_a_stratified_tenth_and_leave_every_class_in_training():
    labels = np.repeat([0, 1, 2], [500, 490, 1])
    kept, heldout = probe.split_heldout(labels, 0.1, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, heldout])), np.arange(991))
    assert np.bincount(labels[heldout], minlength=3).tolist() == [50, 49, 0]
    with pytest.raises(ValueError, match="none to hold out"):
        probe.split_heldout(np.arange(4), 0.1, seed=0)


def test_linear_probe_reaches_logistic_regression(blobs):
    features, labels = blobs
    head, metrics, best = probe.fit_linear(
        features[:800], labels[:800], features[800:1000], labels[800:1000],
        num_classes=3, key=jax.random.key(0), epochs=30, learning_rate=1e-2,
    )  # fmt: skip
    accuracy = np.mean(np.argmax(probe.linear_logits(head, features[1000:]), axis=1) == labels[1000:])
    spread = features[:800].std(axis=0)
    oracle = LogisticRegression(C=np.inf, max_iter=1000).fit(features[:800] / spread, labels[:800])
    assert abs(accuracy - oracle.score(features[1000:] / spread, labels[1000:])) <= 0.02
    assert metrics.train_loss.shape == (30,)
    assert 0 <= best < 30


def test_linear_head_is_that_of_the_epoch_best_on_heldout_images(blobs):
    features, labels = blobs
    heldout = features[800:860], labels[800:860]
    # A learning rate far too high makes the epochs differ, so that the last one is not the best.
    head, metrics, best = probe.fit_linear(
        features[:800], labels[:800], *heldout, num_classes=3, key=jax.random.key(4), epochs=8, learning_rate=3.0
    )
    logits = np.asarray(probe.linear_logits(head, heldout[0]), np.float64)
    expected = -log_softmax(logits, axis=1)[range(60), heldout[1]].mean()
    np.testing.assert_allclose(metrics.heldout_loss[best], expected, rtol=1e-6)  # a mean in float32: a few ulp
    assert np.mean(logits.argmax(1) == heldout[1]) == pytest.approx(float(metrics.heldout_accuracy[best]))
    order = sorted(range(8), key=lambda e: (-float(metrics.heldout_accuracy[e]), float(metrics.heldout_loss[e])))
    assert best == order[0]


def test_linear_probe_does_not_see_the_scale_of_the_features(blobs):
    features, labels = blobs
    options = {"num_classes": 3, "key": jax.random.key(1)}
    factors, shift = np.logspace(2, -2, 8).astype(np.float32), 3.0

    def predict(x):
        head, *_ = probe.fit_linear(x[:800], labels[:800], x[800:1000], labels[800:1000], **options)
        return np.asarray(probe.linear_logits(head, x[1000:]))

    # float32 standardises with rounding errors; 1.5e-5 measured in logits of size one.
    np.testing.assert_allclose(predict(features), predict(features * factors + shift), atol=1e-4)


def test_a_constant_feature_and_a_set_smaller_than_a_batch_are_no_trouble():
    features, labels = random_features(20, 5, 0), np.arange(20) % 2
    features[:, 2] = 7.0
    head, metrics, _ = probe.fit_linear(
        features[:15], labels[:15], features[15:], labels[15:], num_classes=2, key=jax.random.key(0)
    )
    assert np.isfinite(head.kernel).all() and np.isfinite(metrics.train_loss).all()
    assert (np.asarray(head.kernel)[2] == 0).all()
