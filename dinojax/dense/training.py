"""One step of training a dense head: AdamW on batches of cached patches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Float, Key, Shaped

from dinojax.dense.head import HeadParameters, Statistics, initial_head, train_scores

Loss = Callable[[Float[Array, "batch rows columns outputs"], Shaped[Array, "batch height width"]], Float[Array, ""]]


class HeadState(NamedTuple):
    """A head in training."""

    parameters: HeadParameters
    statistics: Statistics
    optimizer: Any


def head_optimizer(
    learning_rate: float, steps: int, *, warmup_steps: int = 0, weight_decay: float = 1e-4
) -> optax.GradientTransformation:
    """AdamW, whose learning rate rises over `warmup_steps` and falls along a line to 0 after `steps`."""
    rise = optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
    fall = optax.linear_schedule(learning_rate, 0.0, max(steps - warmup_steps, 1))
    schedule = optax.join_schedules([rise, fall], [warmup_steps])
    return optax.adamw(schedule, weight_decay=weight_decay)


def init_head_state(
    key: Key[Array, ""], width: int, outputs: int, optimizer: optax.GradientTransformation
) -> HeadState:
    """The state before the first step.

    Args:
        key: of the initial kernel.
        width: numbers of a patch.
        outputs: scores of a patch.
        optimizer: of the steps.
    """
    parameters, statistics = initial_head(key, width, outputs)
    return HeadState(parameters, statistics, optimizer.init(parameters))


def make_head_step(
    loss: Loss, optimizer: optax.GradientTransformation
) -> Callable[[HeadState, Array, Array], tuple[HeadState, Array]]:
    """The compiled step: state, patches "batch rows columns width" and targets → state and loss before the step."""

    def step(state: HeadState, patches: Array, targets: Array) -> tuple[HeadState, Array]:
        def objective(parameters: HeadParameters) -> tuple[Array, Statistics]:
            scores, statistics = train_scores(parameters, state.statistics, patches)
            return loss(scores, targets), statistics

        (value, statistics), gradients = jax.value_and_grad(objective, has_aux=True)(state.parameters)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        return HeadState(optax.apply_updates(state.parameters, updates), statistics, optimizer_state), value

    return jax.jit(step)
