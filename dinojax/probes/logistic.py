"""Logistic regression by L-BFGS, and the selection of its regularisation on held-out images."""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    """Logistic regressions for several values of C.

    Attributes:
        Cs: inverse strengths of the penalty, ascending.
        heldout_accuracy: accuracy of each on held-out images, a fraction.
        iterations: number of L-BFGS steps of each, starting from the previous solution.
        best: index of the highest held-out accuracy, with the smallest C among equals.
        head: the classifier of the best C.
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
    """The linear classifier with the objective of scikit-learn's `LogisticRegression(C=C)`.

    It minimises mean cross-entropy + ‖kernel‖² / (2 · C · images), without a penalty on the bias. With two classes the
    penalty is doubled, to match scikit-learn, whose two-class model has a single column.

    Args:
        train_features: raw features.
        train_labels: class indices.
        num_classes: number of classes.
        C: inverse strength of the penalty.
        warm_start: where to start; None starts at zero.
        max_iterations: largest number of L-BFGS steps.
        tolerance: stop when no component of the gradient (in units scaled to the penalty) is larger. The search also
            stops when float precision allows no further descent.

    Raises:
        UserError: features, labels or a C that cannot be learned from.
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
    """`fit_logistic` for each of `Cs` in ascending order; each starts from the previous solution.

    Raises:
        UserError: features, labels or a C that cannot be learned from.
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
    """Heads, held-out accuracies and iterations for each C of the grid."""

    def fit(head, inverse_penalty):
        head, iterations = _minimise(head, *train, inverse_penalty, max_iterations, tolerance)
        hits = linear_logits(head, heldout[0]).argmax(axis=1) == heldout[1]
        return head, (head, hits.mean(), iterations)

    return jax.lax.scan(fit, head, grid)[1]


@jax.jit
def _minimise(head, features, labels, inverse_penalty, max_iterations, tolerance) -> tuple[LinearHead, Any]:
    """The head at the minimum, and the number of L-BFGS steps to it."""
    # Transposed once, both products of a step run over contiguous rows: on a CPU in less than half the time.
    columns = features.T
    weight = (2 if head.kernel.shape[1] == 2 else 1) / (2 * inverse_penalty * len(labels))
    # In these units a strong penalty gives the kernel the same curvature as the loss gives the bias. Otherwise the
    # steps are as short as the kernel needs, and the descent ends by rounding before the bias has converged.
    unit = 1 / jnp.sqrt(1 + 2 * weight)

    def objective(head):
        scores = jnp.matmul(unit * head.kernel.T, columns, precision="highest").T + head.bias[None]
        return cross_entropy(scores, labels).mean() + weight * jnp.sum((unit * head.kernel) ** 2)

    search = optax.scale_by_zoom_linesearch(_LINE_SEARCH_STEPS, initial_guess_strategy="one")
    optimizer = optax.lbfgs(memory_size=_MEMORY, linesearch=search)
    value_and_gradient = optax.value_and_grad_from_state(objective)

    def is_unfinished(carry):
        _, state, step, descends = carry
        steepest = jax.tree.reduce(jnp.maximum, jax.tree.map(lambda g: jnp.abs(g).max(), optax.tree.get(state, "grad")))
        return (step == 0) | ((steepest > tolerance) & descends & (step < max_iterations))

    def step(carry):
        head, state, step, _ = carry
        value, gradient = value_and_gradient(head, state=state)
        updates, state = optimizer.update(gradient, state, head, value=value, grad=gradient, value_fn=objective)
        return optax.apply_updates(head, updates), state, step + 1, optax.tree.get(state, "value") < value

    head = LinearHead(head.kernel / unit, head.bias)
    head, _, steps, _ = jax.lax.while_loop(is_unfinished, step, (head, optimizer.init(head), 0, True))
    return LinearHead(unit * head.kernel, head.bias), steps


def _zeros(dim: int, num_classes: int) -> LinearHead:
    return LinearHead(jnp.zeros((dim, num_classes)), jnp.zeros(num_classes))


def _check_positive(inverse_penalty: float) -> None:
    require(inverse_penalty > 0, "C", inverse_penalty, "a positive number")
