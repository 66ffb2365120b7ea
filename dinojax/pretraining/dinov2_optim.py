"""DINOv2's optimiser as an optax transform: clipping per sub-module, layer-wise learning rates, the slow last layers.

Source: facebookresearch/dinov2 b8931f7 `dinov2/utils/param_groups.py` and `dinov2/train/train.py`, `torch.optim.AdamW`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dinojax.pretraining.monitors import gradient_norms
from dinojax.pretraining.optim import LAST_LAYER, names_of
from dinojax.pretraining.schedules import Schedule

_FIRST_LAYER = ("cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed")


def dinov2_optimizer(
    learning_rate: Schedule,
    weight_decay: Schedule,
    *,
    clip_norm: float | None = 3.0,
    layer_decay: float = 0.9,
    patch_embed_factor: float = 0.2,
    freeze_last_layer_steps: int = 0,
) -> optax.GradientTransformation:
    """AdamW as DINOv2 uses it.

    Backbone and heads are clipped separately, each by the norm of all its gradients. Learning rates fall from the last
    block to the first, see `learning_rate_factors`, and weight decay with them. During the first
    `freeze_last_layer_steps` the learning rate of the heads' last layers is zero: they neither move nor decay, but
    their moments and step count run, and they count in the norm.

    Args:
        learning_rate: step → learning rate of the heads.
        weight_decay: step → weight decay; biases, norms and LayerScale factors have none.
        clip_norm: largest norm of the gradients of a sub-module; None or 0 leaves clipping out.
        layer_decay: factor from each layer to the one before it.
        patch_embed_factor: additional factor of the patch embedding.
        freeze_last_layer_steps: upstream's `freeze_last_layer_epochs`, in steps.
    """

    def factors(params: Any) -> Any:
        return learning_rate_factors(params, layer_decay=layer_decay, patch_embed_factor=patch_embed_factor)

    return optax.chain(
        clip_by_submodule_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        _descend(learning_rate, weight_decay, factors, freeze_last_layer_steps),
    )


def clip_by_submodule_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all tensors of a sub-module by min(1, max_norm / (norm + 1e-6)), where norm is that of all of them."""

    def clip(gradients: Any, _: Any) -> Any:
        factors = {name: jnp.minimum(1, max_norm / (norm + 1e-6)) for name, norm in submodule_norms(gradients).items()}
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x * factors[names_of(path)[0]].astype(x.dtype), gradients
        )

    return optax.stateless(clip)


def submodule_norms(gradients: Any) -> dict[str, Float[Array, ""]]:
    """The norm of all gradients of each sub-module (backbone and heads), by its name."""
    tensors: dict[str, list[Array]] = {}
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        tensors.setdefault(names_of(path)[0], []).append(gradient)
    return {name: gradient_norms(found, None)[0] for name, found in tensors.items()}


def learning_rate_factors(params: Any, *, layer_decay: float, patch_embed_factor: float) -> Any:
    """The factor of each parameter's learning rate.

    With d blocks it is layer_decay ** (d + 1) for tokens, position table and patch embedding, layer_decay ** (d - i)
    for block i from 0, and 1 for the final norm and the heads. The patch embedding has `patch_embed_factor` on top.
    """
    paths = [names_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    depth = 1 + max((int(names[2]) for names in paths if names[:2] == ["backbone", "blocks"]), default=0)

    def factor(path: tuple[Any, ...], _: Any) -> float:
        part, name, *rest = names_of(path)
        if part != "backbone":
            return 1.0
        if name in _FIRST_LAYER:
            return layer_decay ** (depth + 1) * (patch_embed_factor if name == "patch_embed" else 1.0)
        return layer_decay ** (depth - int(rest[0])) if name == "blocks" else 1.0

    return jax.tree_util.tree_map_with_path(factor, params)


def weight_decay_factors(params: Any) -> Any:
    """0 for biases, norms and LayerScale factors, and 1 for everything else, tokens and prototypes included."""

    def factor(path: tuple[Any, ...], _: Any) -> float:
        names = names_of(path)
        return float(not (names[-1] in ("bias", "gamma") or any("norm" in name for name in names)))

    return jax.tree_util.tree_map_with_path(factor, params)


def is_last_layer(params: Any) -> Any:
    """A mask of the parameters of the heads' last layers, lengths and directions of the prototypes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: LAST_LAYER in names_of(path), params)


def _descend(
    learning_rate: Schedule, weight_decay: Schedule, factors: Callable[[Any], Any], freeze_last_layer_steps: int
) -> optax.GradientTransformation:
    """Adds decoupled weight decay and scales by the learning rate of each parameter."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        rate, decay = learning_rate(state.count), weight_decay(state.count)
        rate_of_last_layers = jnp.where(state.count < freeze_last_layer_steps, 0, rate)

        def one(update: Array, param: Array, factor: float, decay_factor: float, last: bool) -> Array:
            own_rate = jnp.asarray(factor * (rate_of_last_layers if last else rate), update.dtype)
            return -own_rate * (update + jnp.asarray(decay_factor * decay, update.dtype) * param)

        trees = factors(params), weight_decay_factors(params), is_last_layer(params)
        return jax.tree.map(one, updates, params, *trees), optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)
