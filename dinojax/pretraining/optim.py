"""DINO's optimiser as optax transforms: clipping per tensor, decay groups, the frozen last layer.

Source: facebookresearch/dino 7c446df `utils.clip_gradients`, `utils.get_params_groups`,
`utils.cancel_gradients_last_layer`, and `torch.optim.AdamW`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from dinojax.parallel import norm
from dinojax.pretraining.schedules import Schedule

LAST_LAYER = "last_layer"


def dino_optimizer(
    learning_rate: Schedule,
    weight_decay: Schedule,
    *,
    clip_norm: float | None = 3.0,
    freeze_last_layer_steps: int = 0,
    frozen: tuple[str, ...] = (),
) -> optax.GradientTransformation:
    """AdamW as DINO uses it.

    Each tensor is clipped to `clip_norm` separately. Weight decay applies to all parameters except biases and other
    vectors, so also to the class token, the position table and the prototypes. During the first
    `freeze_last_layer_steps` the last layer of the head is frozen: no update, no decay, no moments. Its bias correction
    starts afterwards.

    Args:
        learning_rate: step → learning rate.
        weight_decay: step → weight decay.
        clip_norm: largest norm of a gradient; None or 0 leaves clipping out.
        freeze_last_layer_steps: upstream's `freeze_last_layer` epochs, in steps.
        frozen: names of parameters that never change, such as "weight_g".
    """

    def adamw(delay: int) -> optax.GradientTransformation:
        """AdamW for parameters whose first update is at step `delay` of the training."""
        return optax.chain(
            clip_by_tensor_norm(clip_norm) if clip_norm else optax.identity(),
            optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
            _in_own_dtype(optax.add_decayed_weights(lambda count: weight_decay(count + delay), mask=is_decayed)),
            optax.scale_by_learning_rate(lambda count: learning_rate(count + delay)),
        )

    def group(path: tuple[Any, ...], _: Any) -> str:
        names = names_of(path)
        if names[-1] in frozen:
            return "frozen"
        return LAST_LAYER if LAST_LAYER in names else "rest"

    return optax.partition(
        {
            "rest": adamw(delay=0),
            LAST_LAYER: optax.conditionally_mask(
                adamw(delay=freeze_last_layer_steps), lambda step: step >= freeze_last_layer_steps
            ),
            "frozen": optax.set_to_zero(),
        },
        lambda params: jax.tree_util.tree_map_with_path(group, params),
    )


def clip_by_tensor_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales each tensor g by min(1, max_norm / (‖g‖ + 1e-6))."""

    def clip(gradient: Array) -> Array:
        return gradient * jnp.minimum(1, max_norm / (norm(gradient) + 1e-6)).astype(gradient.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def scale_part(name: str, factor: Schedule) -> optax.GradientTransformation:
    """Scales the updates of the sub-module `name` by `factor(step)`.

    As the last transform, a factor of 0 freezes the sub-module, weight decay included, while its moments run.
    """

    def update(
        updates: Any, state: optax.ScaleByScheduleState, params: Any = None
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        now = factor(state.count)

        def one(path: tuple[Any, ...], x: Array) -> Array:
            return x * jnp.asarray(now, x.dtype) if names_of(path)[0] == name else x

        count = optax.safe_increment(state.count)
        return jax.tree_util.tree_map_with_path(one, updates), optax.ScaleByScheduleState(count)

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)


def is_decayed(params: Any) -> Any:
    """A mask of the parameters with weight decay: all except biases and other vectors."""
    return jax.tree_util.tree_map_with_path(
        lambda path, param: names_of(path)[-1] != "bias" and jnp.ndim(param) > 1, params
    )


def _in_own_dtype(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Updates keep their dtypes: a schedule is a float64 number where jax computes in 64 bits."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        changed, state = transform.update(updates, state, params)
        return jax.tree.map(lambda x, before: x.astype(before.dtype), changed, updates), state

    return optax.GradientTransformation(transform.init, update)


def names_of(path: tuple[Any, ...]) -> list[str]:
    """The names along a path through nested dictionaries, without the `.value` of a Flax variable."""
    return [str(entry.key) for entry in path if isinstance(entry, jax.tree_util.DictKey)]
