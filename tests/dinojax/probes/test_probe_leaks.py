"""Shuffled labels: no classifier may score above chance on them; and few-shot draws."""

import jax
import numpy as np
import pytest
from scipy.stats import binom

from dinojax import UserError
from dinojax import probes as probe

CLASSES, TRAIN, HELDOUT, TEST = 4, 400, 100, 1000


@pytest.fixture(scope="module")
def separated():
    """Tokens [images, 5, 8] of well separated classes: with true labels every classifier is nearly always right."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, TRAIN + HELDOUT + TEST)
    centres = 3 * rng.standard_normal((CLASSES, 5, 8))
    return (centres[labels] + rng.standard_normal((len(labels), 5, 8))).astype(np.float32), labels


def linear_of(fit):
    def predict(train, heldout, test):
        head, *_ = fit(*train, *heldout, num_classes=CLASSES, key=jax.random.key(0))
        logits = probe.mlp_logits if fit is probe.fit_mlp else probe.linear_logits
        return np.asarray(logits(head, test)).argmax(axis=1)

    return predict


def sweep(train, heldout, test):
    parts = [features.reshape(-1, 2, 4) for features in (train[0], heldout[0], test)]
    options = {"num_classes": CLASSES, "key": jax.random.key(0), "steps": 200}
    found = probe.fit_linear_sweep(parts[0], train[1], parts[1], heldout[1], **options)
    return np.asarray(probe.linear_logits(found.head, probe.sweep_inputs(parts[2], found.settings[found.best]))).argmax(
        1
    )


def logistic_grid(train, heldout, test):
    found = probe.fit_logistic_grid(*train, *heldout, num_classes=CLASSES, Cs=(1e-2, 1, 100))
    return np.asarray(probe.linear_logits(found.head, test)).argmax(axis=1)


CLASSIFIERS = {
    "weighted k-NN": lambda train, _, test: probe.knn_predict(*train, test, num_classes=CLASSES, ks=[20])[20],
    "Euclidean k-NN": lambda train, _, test: probe.euclidean_knn_predict(*train, test, num_classes=CLASSES),
    "linear": linear_of(probe.fit_linear),
    "MLP": linear_of(probe.fit_mlp),
    "sweep": sweep,
    "logistic": logistic_grid,
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_shuffled_labels_score_at_chance(separated, name):
    features, labels = separated[0][:, 0], separated[1]
    ends = TRAIN, TRAIN + HELDOUT
    parts = np.split(features, ends)

    def hits(labels):
        train, heldout, test = zip(parts, np.split(labels, ends))
        return int(np.sum(CLASSIFIERS[name](train, heldout, test[0]) == test[1]))

    assert hits(labels) > 0.95 * TEST
    # All labels are drawn again, so that each hit is a coin of 1/4 whatever was learned: two-sided 1 in 10,000.
    low, high = binom.ppf([0.5e-4, 1 - 0.5e-4], TEST, 1 / CLASSES)
    assert low <= hits(np.random.default_rng(1).integers(0, CLASSES, len(labels))) <= high


def test_few_shot_learns_from_true_labels_and_scores_at_chance_on_shuffled_ones(separated):
    features, labels = separated[0][:, 0], separated[1]
    shuffled = np.random.default_rng(2).integers(0, CLASSES, len(labels))
    options = {"num_classes": CLASSES, "shots": 5, "seeds": (0, 1, 2)}
    true = probe.few_shot(features[:TRAIN], labels[:TRAIN], features[-TEST:], labels[-TEST:], **options)
    chance = probe.few_shot(features[:TRAIN], shuffled[:TRAIN], features[-TEST:], shuffled[-TEST:], **options)
    low, high = binom.ppf([0.5e-4, 1 - 0.5e-4], TEST, 1 / CLASSES) / TEST
    assert list(true) == ["1nn", "knn", "linear"]
    for method, accuracies in true.items():
        assert accuracies.shape == (3,)
        assert (accuracies > 0.9).all()
        assert ((low <= chance[method]) & (chance[method] <= high)).all()


def test_few_shot_nearest_image_is_that_of_the_draw(separated):
    features, labels = separated[0][:, 0] - 20, separated[1]  # far from the origin angles separate badly: many errors
    options = {"num_classes": CLASSES, "shots": 2, "seeds": (7,), "methods": ("1nn",)}
    found = probe.few_shot(features[:TRAIN], labels[:TRAIN], features[-TEST:], labels[-TEST:], **options)
    chosen = probe.few_shot_indices(labels[:TRAIN], 2, 7)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    nearest = labels[chosen][(unit[-TEST:].astype(float) @ unit[chosen].T.astype(float)).argmax(axis=1)]
    np.testing.assert_allclose(found["1nn"], np.mean(nearest == labels[-TEST:]), atol=2 / TEST)


def test_few_shot_accuracies_are_those_of_its_predictions(separated):
    features, labels = separated[0][:, 0] - 20, separated[1]
    options = {"num_classes": CLASSES, "shots": 2, "seeds": (7, 8)}
    found = probe.few_shot_predictions(features[:TRAIN], labels[:TRAIN], features[-TEST:], **options)
    accuracies = probe.few_shot(features[:TRAIN], labels[:TRAIN], features[-TEST:], labels[-TEST:], **options)
    for method, classes in found.items():
        assert classes.shape == (2, TEST) and (classes[0] != classes[1]).any()
        assert [np.mean(draw == labels[-TEST:]) for draw in classes] == pytest.approx(accuracies[method].tolist())


def test_few_shot_draws_so_many_of_every_class():
    labels = np.random.default_rng(0).integers(0, 3, 50) * 2  # classes 0, 2, 4: gaps are no trouble
    chosen = probe.few_shot_indices(labels, 4, seed=1)
    assert (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen]).tolist() == [4, 0, 4, 0, 4]
    np.testing.assert_array_equal(chosen, probe.few_shot_indices(labels, 4, seed=1))
    assert set(chosen) != set(probe.few_shot_indices(labels, 4, seed=2))
    with pytest.raises(UserError, match="shots=0"):
        probe.few_shot_indices(labels, 0, seed=0)
    smallest = np.bincount(labels)[[0, 2, 4]].min()
    with pytest.raises(UserError, match=rf"shots=40 is more than the {smallest} images of class [024]"):
        probe.few_shot_indices(labels, 40, seed=0)


def test_an_unknown_few_shot_method_is_named(separated):
    features, labels = separated[0][:, 0], separated[1]
    with pytest.raises(UserError, match="method='svc' is not one of 1nn, knn, linear"):
        probe.few_shot(features, labels, features, labels, num_classes=CLASSES, methods=("1nn", "svc"))
