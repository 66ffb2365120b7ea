"""Logistic regression by L-BFGS, and the choice of its regularisation on held-out images."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from dinojax.errors import require
from dinojax.probes.labelled import check_finite, check_labelled, check_range
from dinojax.probes.linear import LinearHead, cross_entropy, linear_logits

# Source: facebookresearch/dinov2 `dinov2/eval/log_regression.py`.
LOGISTIC_CS = tuple(np.logspace(-6, 5, 45).tolist())
_MEMORY = 10
_LINE_SEARCH_STEPS = 20


class LogisticGrid(NamedTuple):
    """Logistic regressions along C.

    Attributes:
        Cs: inverse strengths of the penalty, ascending.
        heldout_accuracy: fractions.
        iterations: how many L-BFGS steps each took from the solution before it.
        best: index of the highest held-out accuracy, among equals of the smallest C.
        head: of the best C.
    """

    Cs: tuple[float, ...]
    heldout_accuracy: Float[np.ndarray, " grid"]
    iterations: Int[np.ndarray, " grid"]
    best: int
    head: LinearHead


def fit_logistic(
    train_features: Float[Array | np.ndarray, "train dim"],
    train_labels: Int[Array | np.ndarray, " train"],
    *,
    num_classes: int,
    C: float,  # noqa: N803
    warm_start: LinearHead | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> LinearHead:
    """The linear classifier of least cross-entropy + penalty, as scikit-learn's `LogisticRegression(C=C)` means it.

    Minimises mean cross-entropy + ‖kernel‖² / (2 · C · images), the bias free of penalty (with two classes twice the
    penalty, which is scikit-learn's, whose two-class model has one column). Ends when no component of the gradient (in
    units that suit the penalty) exceeds `tolerance`, when float precision allows no further descent, or after
    `max_iterations`.

    Raises:
        UserError: features, labels or a C that nothing can be learned from.
    """
    check_labelled(train_features, train_labels, num_classes)
    _check_positive(C)
    features = jnp.asarray(train_features, float)
    start = warm_start or _zeros(features.shape[1], num_classes)
    return _minimise(start, features, jnp.asarray(train_labels), float(C), max_iterations, tolerance)[0]


def fit_logistic_grid(
    train_features: Float[Array | np.ndarray, "train dim"],
    train_labels: Int[Array | np.ndarray, " train"],
    heldout_features: Float[Array | np.ndarray, "heldout dim"],
    heldout_labels: Int[Array | np.ndarray, " heldout"],
    *,
    num_classes: int,
    Cs: Sequence[float] | Float[np.ndarray, " grid"] = LOGISTIC_CS,  # noqa: N803
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> LogisticGrid:
    """`fit_logistic` for each of `Cs`, from the smallest to the largest, each starting where the last one ended.

    Raises:
        UserError: features, labels or a C that nothing can be learned from.
    """
    check_labelled(train_features, train_labels, num_classes)
    check_range(heldout_labels, num_classes)
    check_finite(heldout_features)
    ascending = sorted(map(float, Cs))
    _check_positive(ascending[0])
    train = jnp.asarray(train_features, float), jnp.asarray(train_labels)
    heldout = jnp.asarray(heldout_features, float), jnp.asarray(heldout_labels)
    heads, accuracy, iterations = _minimise_along(
        _zeros(train_features.shape[1], num_classes),
        train,
        heldout,
        jnp.asarray(ascending, float),
        max_iterations,
        tolerance,
    )
    best = int(np.argmax(accuracy))
    head = LinearHead(heads.kernel[best], heads.bias[best])
    return LogisticGrid(tuple(ascending), np.asarray(accuracy), np.asarray(iterations), best, head)


@jax.jit
def _minimise_along(head, train, heldout, grid, max_iterations, tolerance) -> tuple:
    """Heads, held-out accuracies and iterations along C."""

    def fit(head, inverse_penalty):
        head, iterations = _minimise(head, *train, inverse_penalty, max_iterations, tolerance)
        hits = linear_logits(head, heldout[0]).argmax(axis=1) == heldout[1]
        return head, (head, hits.mean(), iterations)

    return jax.lax.scan(fit, head, grid)[1]


@jax.jit
def _minimise(head, features, labels, inverse_penalty, max_iterations, tolerance) -> tuple[LinearHead, Array]:
    """The head at the minimum, and the number of L-BFGS steps to it."""
    # Transposed once: both products of a step then run over contiguous rows, on CPU in less than half the time.
    columns = features.T
    weight = (2 if head.kernel.shape[1] == 2 else 1) / (2 * inverse_penalty * len(labels))
    # In these units a strong penalty curves the kernel as little as the loss curves the bias. Without them the steps
    # are as short as the kernel needs, and descent ends in rounding before the bias has got anywhere.
    unit = 1 / jnp.sqrt(1 + 2 * weight)

    def objective(head):
        scores = jnp.matmul(unit * head.kernel.T, columns, precision="highest").T + head.bias[None]
        return cross_entropy(scores, labels).mean() + weight * jnp.sum((unit * head.kernel) ** 2)

    search = optax.scale_by_zoom_linesearch(_LINE_SEARCH_STEPS, initial_guess_strategy="one")
    optimizer = optax.lbfgs(memory_size=_MEMORY, linesearch=search)
    value_and_gradient = optax.value_and_grad_from_state(objective)

    def goes_on(carry):
        _, state, step, descends = carry
        steepest = jax.tree.reduce(jnp.maximum, jax.tree.map(lambda g: jnp.abs(g).max(), optax.tree.get(state, "grad")))
        return (step == 0) | ((steepest > tolerance) & descends & (step < max_iterations))

    def step(carry):
        head, state, step, _ = carry
        value, gradient = value_and_gradient(head, state=state)
        updates, state = optimizer.update(gradient, state, head, value=value, grad=gradient, value_fn=objective)
        return optax.apply_updates(head, updates), state, step + 1, optax.tree.get(state, "value") < value

    head = LinearHead(head.kernel / unit, head.bias)
    head, _, steps, _ = jax.lax.while_loop(goes_on, step, (head, optimizer.init(head), 0, True))
    return LinearHead(unit * head.kernel, head.bias), steps


def _zeros(dim: int, num_classes: int) -> LinearHead:
    return LinearHead(jnp.zeros((dim, num_classes)), jnp.zeros(num_classes))


def _check_positive(inverse_penalty: float) -> None:
    require(inverse_penalty > 0, "C", inverse_penalty, "a positive number")
