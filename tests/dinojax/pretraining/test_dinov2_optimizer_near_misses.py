"""Mistakes in DINOv2's optimiser and moving average, planted one at a time: the official weights expose each.

The gradients are those of a correct run, so that no network is compiled again.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dinojax.pretraining import dinov2_optim, optim, step
from dinojax.pretraining.monitors import gradient_norms
from tests.support import dinov2_parity as parity
from tests.support.dinov2_parity import SINKHORN, exact, too_large
from tests.support.dinov2_replay import optimizer_differences

pytestmark = pytest.mark.near_miss


def names_in(params, function):
    """A tree of `function(names of the parameter)`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: function(optim.names_of(path)), params)


def factors(name, change):
    """`change(names, factor)` in one of the trees of factors."""

    def plant(patch):
        original = getattr(dinov2_optim, name)

        def other(params, **options):
            found = original(params, **options)
            return jax.tree_util.tree_map_with_path(lambda path, x: change(optim.names_of(path), x), found)

        patch.setattr(dinov2_optim, name, other)

    return plant


def decay_with_the_whole_rate(patch):
    original = dinov2_optim.weight_decay_factors

    def other(params):
        config = exact(SINKHORN)[0].config
        rates = dinov2_optim.learning_rate_factors(
            params, layer_decay=config["layerwise_decay"], patch_embed_factor=config["patch_embed_lr_mult"]
        )
        return jax.tree.map(lambda decay, rate: decay / rate, original(params), rates)

    patch.setattr(dinov2_optim, "weight_decay_factors", other)


def settings(**changes):
    def plant(patch):
        original = parity.optimizer_of
        patch.setattr(parity, "optimizer_of", lambda config: original(config | changes))

    return plant


def one_clip_over_all(max_norm):
    def clip(gradients, _):
        factor = jnp.minimum(1, max_norm / (gradient_norms(gradients, None)[0] + 1e-6))
        return jax.tree.map(lambda x: x * factor, gradients)

    return optax.stateless(clip)


def replaced_clipping(clip):
    return lambda patch: patch.setattr(dinov2_optim, "clip_by_submodule_norm", clip)


def changed_updates(change, before=None, **settings):
    """`change(names, update, parameter, frozen, rate, decay)` after the optimizer; `before` alike on its gradients."""

    def plant(patch):
        original = parity.optimizer_of

        def other(config):
            inner, values = original(config | settings), parity.schedules(config)
            frozen_steps = config["freeze_last_layer_epochs"] * config["steps_per_epoch"]

            def apply(function, updates, params, count):
                numbers = count < frozen_steps, values["lr"](count), values["weight_decay"](count)
                return jax.tree_util.tree_map_with_path(
                    lambda path, x, p: function(optim.names_of(path), x, p, *numbers), updates, params
                )

            def update(gradients, state, params):
                count, inner_state = state
                gradients = gradients if before is None else apply(before, gradients, params, count)
                updates, inner_state = inner.update(gradients, inner_state, params)
                return apply(change, updates, params, count), (count + 1, inner_state)

            return optax.GradientTransformation(lambda params: (0, inner.init(params)), update)

        patch.setattr(parity, "optimizer_of", other)

    return plant


def decay_while_frozen(names, update, param, frozen, rate, decay):
    return update - rate * decay * param if frozen and "last_layer" in names else update


def still_lengths(names, update, *_):
    return 0 * update if names[-1] == "weight_g" else update


def zero_while_frozen(names, update, param, frozen, *_):
    return 0 * update if frozen and "last_layer" in names else update


def unchanged(names, update, *_):
    return update


def frozen_by_skipping(patch):
    """As DINO v1: no moments and no step count in that time."""
    original = parity.optimizer_of

    def other(config):
        values, steps = parity.schedules(config), config["freeze_last_layer_epochs"] * config["steps_per_epoch"]
        later = dinov2_optim.dinov2_optimizer(
            lambda count: values["lr"](count + steps),
            lambda count: values["weight_decay"](count + steps),
            clip_norm=None,
        )
        rest = original(config | {"freeze_last_layer_epochs": 0, "clip_grad": None})
        return optax.chain(
            dinov2_optim.clip_by_submodule_norm(config["clip_grad"]),
            optax.partition(
                {"last": optax.conditionally_mask(later, lambda step: step >= steps), "rest": rest},
                lambda params: names_in(params, lambda names: "last" if "last_layer" in names else "rest"),
            ),
        )

    patch.setattr(parity, "optimizer_of", other)


def average_before_the_step(patch):
    original, students = step.moving_average, []

    def late(new, old, weight):
        students.append(new)
        before = parity.parameters(exact(SINKHORN)[0], "state/initial", np.float64)
        return original(students[-2] if len(students) > 1 else before, old, weight)

    patch.setattr(step, "moving_average", late)


def average_leaves_out(which):
    def plant(patch):
        original = step.moving_average

        def other(new, old, weight):
            averaged = original(new, old, weight)
            return jax.tree_util.tree_map_with_path(
                lambda path, x, before: before if which(optim.names_of(path)) else x, averaged, old
            )

        patch.setattr(step, "moving_average", other)

    return plant


TOKENS = {"cls_token", "pos_embed", "register_tokens", "mask_token"}
HEADS = ("dino_head", "ibot_head")
OPTIMIZER = {
    "last layer never frozen": settings(freeze_last_layer_epochs=0),
    "last layer frozen by skipping": frozen_by_skipping,
    "last layer frozen by zero gradient": changed_updates(unchanged, zero_while_frozen, freeze_last_layer_epochs=0),
    "last layer decays while frozen": changed_updates(decay_while_frozen),
    "last-layer rate for all heads": factors("is_last_layer", lambda names, last: names[0] in HEADS),
    "weight_g frozen": changed_updates(still_lengths),
    "decay on every parameter": factors("weight_decay_factors", lambda names, factor: 1.0),
    "tokens exempt from decay": factors("weight_decay_factors", lambda n, x: 0.0 if TOKENS & set(n) else x),
    "weight_g exempt from decay": factors("weight_decay_factors", lambda n, x: 0.0 if n[-1] == "weight_g" else x),
    "decay uses the rate without its factor": decay_with_the_whole_rate,
    "layer-wise decay left out": settings(layerwise_decay=1.0),
    "layer-wise decay off by one": factors(
        "learning_rate_factors", lambda n, x: x if n[0] in HEADS or n[1] == "norm" else x / 0.8
    ),
    "patch-embed factor left out": settings(patch_embed_lr_mult=1.0),
    "no clipping": replaced_clipping(lambda max_norm: optax.identity()),
    "one clip over all sub-modules": replaced_clipping(one_clip_over_all),
    "clip per tensor": replaced_clipping(optim.clip_by_tensor_norm),
    "average before the optimizer": average_before_the_step,
    "average of the backbone only": average_leaves_out(lambda names: names[0] in HEADS),
    "average leaves out last layers": average_leaves_out(lambda names: "last_layer" in names),
    "average leaves out the mask token": average_leaves_out(lambda names: "mask_token" in names),
}


@pytest.mark.slow  # needs a whole training in float64; the trainings alone are compared in each run of the tests
@pytest.mark.parametrize("mistake", OPTIMIZER)
def test_a_mistake_in_the_optimizer_or_the_average_shows(monkeypatch, mistake):
    reference, trajectory = exact(SINKHORN)
    with jax.enable_x64(True):
        OPTIMIZER[mistake](monkeypatch)
        assert too_large(optimizer_differences(reference, trajectory))


@pytest.mark.slow  # as above
def test_the_optimizer_without_a_mistake_shows_nothing():
    reference, trajectory = exact(SINKHORN)
    with jax.enable_x64(True):
        assert not too_large(optimizer_differences(reference, trajectory), "float64")
