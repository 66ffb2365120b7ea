"""Logistic regression against scikit-learn's objective."""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from dinojax import UserError
from dinojax import probes as probe
from dinojax.probes import linear as linear_probe
from dinojax.probes import logistic


def overlapping(classes, images=900, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    features = 0.4 * rng.standard_normal((classes, dim))[labels] + rng.standard_normal((images, dim))
    return (features * np.linspace(0.5, 2, dim) + 1).astype(np.float32), labels


def objective(kernel, bias, features, labels, inverse_penalty):
    """Mean cross-entropy and the penalty of `LogisticRegression`, the kernel centred over classes, in float64."""
    kernel, bias = np.asarray(kernel, np.float64), np.asarray(bias, np.float64)
    loss = -log_softmax(features.astype(np.float64) @ kernel + bias, axis=1)[np.arange(len(labels)), labels].mean()
    # Scikit-learn's two-class model has one column, the difference of the two.
    squares = np.sum((kernel[:, 1] - kernel[:, 0]) ** 2) if kernel.shape[1] == 2 else np.sum(kernel**2)
    return loss + squares / (2 * inverse_penalty * len(labels))


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("inverse_penalty", [1e-4, 0.01, 1, 1e4])
def test_loss_is_that_of_scikit_learn(classes, inverse_penalty):
    features, labels = overlapping(classes)
    oracle = LogisticRegression(C=inverse_penalty, tol=1e-9, max_iter=10_000).fit(features.astype(float), labels)
    kernel, bias = oracle.coef_.T, oracle.intercept_
    if classes == 2:
        kernel, bias = np.concatenate([-kernel, kernel], axis=1) / 2, np.concatenate([-bias, bias]) / 2
    best = objective(kernel, bias, features, labels, inverse_penalty)
    options = {"num_classes": classes, "C": inverse_penalty}
    # In float64 the minimum itself; in float32 the last digits of the loss are lost before it.
    for x64, bound in ((True, 1e-10), (False, 1e-5)):
        with jax.enable_x64(x64):
            head = probe.fit_logistic(features, labels, **options, tolerance=1e-8 if x64 else 1e-6)
        assert abs(objective(head.kernel, head.bias, features, labels, inverse_penalty) - best) < bound
    ours = np.asarray(probe.linear_logits(head, features)).argmax(axis=1)
    assert np.mean(ours == oracle.predict(features.astype(float))) > 0.99


def test_the_strongest_penalty_still_lets_the_bias_find_the_minimum():
    """There the kernel is thousands of times stiffer than the bias."""
    digits = load_digits()
    features, labels = (3 * digits.data[:600] / 16).astype(np.float32), digits.target[:600]
    oracle = LogisticRegression(C=1e-6, tol=1e-9, max_iter=10_000).fit(features.astype(float), labels)
    head = probe.fit_logistic(features, labels, num_classes=10, C=1e-6)
    best = objective(oracle.coef_.T, oracle.intercept_, features, labels, 1e-6)
    assert objective(head.kernel, head.bias, features, labels, 1e-6) - best < 1e-6


def test_a_warm_start_at_the_solution_stays_there():
    features, labels = overlapping(4)
    head = probe.fit_logistic(features, labels, num_classes=4, C=1.0)
    _, steps = logistic._minimise(head, features, labels, 1.0, 1000, 1e-4)
    assert steps == 1
    start = linear_probe.LinearHead(np.zeros_like(head.kernel), np.zeros_like(head.bias))
    again = probe.fit_logistic(features, labels, num_classes=4, C=1.0, warm_start=start)
    np.testing.assert_allclose(again.kernel, head.kernel, atol=1e-6)


def test_grid_is_the_separate_fits_and_picks_the_best_on_heldout_images():
    features, labels = overlapping(4, images=240, dim=60)
    train, heldout = (features[:120], labels[:120]), (features[120:], labels[120:])
    grid = np.logspace(-4, 3, 8)
    found = probe.fit_logistic_grid(*train, *heldout, num_classes=4, Cs=grid[::-1])
    np.testing.assert_allclose(found.Cs, grid)
    scores = [
        LogisticRegression(C=c, tol=1e-8, max_iter=10_000).fit(train[0].astype(float), train[1]).score(*heldout)
        for c in grid
    ]
    np.testing.assert_allclose(found.heldout_accuracy, scores, atol=1.01 / 120)  # one image on the border at most
    assert found.best == np.argmax(found.heldout_accuracy)
    assert 0 < found.best < 7 or found.heldout_accuracy[found.best] > found.heldout_accuracy[0]
    head = probe.fit_logistic(*train, num_classes=4, C=found.Cs[found.best])
    losses = [objective(one.kernel, one.bias, *train, found.Cs[found.best]) for one in (head, found.head)]
    assert abs(losses[0] - losses[1]) < 1e-5
    hits = np.asarray(probe.linear_logits(found.head, heldout[0])).argmax(axis=1) == heldout[1]
    assert np.mean(hits) == pytest.approx(found.heldout_accuracy[found.best])


def test_the_grid_of_the_official_evaluation():
    np.testing.assert_allclose(probe.LOGISTIC_CS, 10 ** np.linspace(-6, 5, 45))


def test_bad_input_is_refused():
    features, labels = overlapping(3, images=60)
    with pytest.raises(UserError, match=r"C=0\.0 is not a positive number"):
        probe.fit_logistic(features, labels, num_classes=3, C=0.0)
    with pytest.raises(UserError, match=r"C=-1\.0 is not a positive number"):
        probe.fit_logistic_grid(features, labels, features, labels, num_classes=3, Cs=(1, -1))
    with pytest.raises(UserError, match="all 60 training images are of class 2"):
        probe.fit_logistic(features, np.full(60, 2), num_classes=3, C=1.0)
    with pytest.raises(UserError, match="not finite"):
        probe.fit_logistic_grid(features, labels, features * np.float32(np.nan), labels, num_classes=3)
