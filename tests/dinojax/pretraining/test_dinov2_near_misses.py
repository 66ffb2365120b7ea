"""Mistakes in DINOv2's objective, networks and schedules, planted one at a time: the official numbers expose each.

Losses and targets are computed from the official logits; whole trainings with a mistake in them are slow.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dinojax.models import head, layers
from dinojax.models.norm import LayerNorm
from dinojax.pretraining import dinov2_losses, dinov2_step, schedules
from dinojax.pretraining.dinov2_step import DINOv2
from dinojax.pretraining.masking import masked_patches
from tests.support import dinov2_parity as parity
from tests.support.dinov2_parity import CENTERING, SINKHORN, exact, too_large
from tests.support.dinov2_replay import objective_differences
from tests.support.reference_files import BUNDLED, read

pytestmark = pytest.mark.near_miss


@functools.cache
def tokens_of(name):
    """Logits and class tokens of steps 0 and 1 of the correct run."""
    with jax.enable_x64(True):
        return parity.intermediates(*exact(name), [0, 1])


# Mistakes in the objective.


def weights(**factors):
    """The logged total instead of the real one, for example: KoLeo and patch loss halved."""

    def plant(patch):
        original = parity.objective_of

        def changed(config):
            objective = original(config)
            return dataclasses.replace(objective, **{k: f * getattr(objective, k) for k, f in factors.items()})

        patch.setattr(parity, "objective_of", changed)

    return plant


def wrapped(module, name, wrapper):
    """`wrapper(original, *arguments)` instead of a function."""

    def plant(patch):
        original = getattr(module, name)
        patch.setattr(module, name, functools.partial(wrapper, original))

    return plant


def koleo_mean(original, tokens, group):
    return original(tokens, group) / len(tokens)


def koleo_over_all(original, tokens, group):
    return len(tokens) * dinov2_losses.koleo_loss(tokens.reshape(-1, tokens.shape[-1]))


def ibot_over_masked_images(original, logits, probs, weights, images, temperature):
    return original(logits, probs, weights, round(float(weights.sum())), temperature)


def ibot_plain_mean(original, logits, probs, weights, images, temperature):
    return original(logits, probs, (weights > 0) / (weights > 0).sum(), 1, temperature)


def ibot_over_batch(original, logits, probs, weights, images, temperature):
    return original(logits, probs, weights, images // 2, temperature)


def views_not_exchanged(original, local, ours, probs, temperature):
    return original(local, ours, probs[::-1], temperature)


def global_not_doubled(original, local, *others):
    local_loss, global_loss = original(local, *others)
    return local_loss, global_loss / 2


def divisor(of_crops):
    def other(original, local, *others):
        factor = (2 * len(local) + 2) / of_crops(len(local))
        return tuple(factor * loss for loss in original(local, *others))

    return wrapped(dinov2_step, "class_token_losses", other)


def center_before_use(original, logits, center, temperature):
    mean = logits.reshape(-1, logits.shape[-1]).mean(axis=0)
    return original(logits, 0.9 * center + 0.1 * mean, temperature)


def one_center_for_both(patch):
    original, seen = dinov2_step.teacher_probs, []

    def other(logits, center, temperature):
        seen.append(center)
        return original(logits, seen[-1 if len(seen) % 2 else -2], temperature)

    patch.setattr(dinov2_step, "teacher_probs", other)


def patch_center_over_all_patches(patch):
    """Of step 0, whose teacher is the initial one."""
    reference, _ = exact(CENTERING)
    teacher = parity.network(reference, parity.initial_teacher(reference), np.float64)
    patches = teacher.tokens(parity.crops_of_step(reference, 0, np.float64)[0])[1]
    everything = teacher.dino_head(patches.reshape(-1, patches.shape[-1])).mean(axis=0)
    patch.setattr(dinov2_step, "updated_patch_center", lambda center, *_: 0.9 * center + 0.1 * everything)


def patch_center_of_image_means(patch):
    reference, numbers = exact(CENTERING)[0], iter(range(2))

    def other(center, logits, valid, momentum):
        masked = masked_patches(parity.masks_of_step(reference, next(numbers)), len(logits))
        return momentum * center + (1 - momentum) * (masked.weight / masked.weight.sum()) @ logits

    patch.setattr(dinov2_step, "updated_patch_center", other)


def iterations(number):
    return wrapped(dinov2_step, "sinkhorn_knopp", lambda original, *others: original(*others, iterations=number))


def sinkhorn_per_view(original, logits, temperature, valid):
    if valid is not None:
        return original(logits, temperature, valid)
    return jnp.concatenate([original(view, temperature, None) for view in jnp.split(logits, 2)])


def sinkhorn_with_padding(original, logits, temperature, valid):
    return original(logits, temperature, None)


def sinkhorn_ends_with_prototypes(original, logits, temperature, valid):
    counts = jnp.ones(len(logits)) if valid is None else valid.astype(float)
    balanced = jnp.exp((logits - logits.max()) / temperature) * counts[:, None]
    for _ in range(3):
        balanced = balanced / jnp.maximum(balanced.sum(axis=1, keepdims=True), 1e-300)
        balanced = balanced / balanced.sum(axis=0, keepdims=True) * counts.sum() / logits.shape[1]
    return balanced


def in_step(name, wrapper):
    return wrapped(dinov2_step, name, wrapper)


OBJECTIVE = {
    "KoLeo mean over the two crops": (CENTERING, in_step("koleo_loss_in_groups", koleo_mean)),
    "KoLeo over all tokens together": (CENTERING, in_step("koleo_loss_in_groups", koleo_over_all)),
    "logged total optimised": (CENTERING, weights(koleo_loss_weight=0.5, ibot_loss_weight=0.5)),
    "iBOT over images with a mask only": (SINKHORN, in_step("ibot_loss", ibot_over_masked_images)),
    "iBOT plain mean over masked patches": (SINKHORN, in_step("ibot_loss", ibot_plain_mean)),
    "iBOT divided by the batch": (SINKHORN, in_step("ibot_loss", ibot_over_batch)),
    "teacher views not exchanged": (SINKHORN, in_step("class_token_losses", views_not_exchanged)),
    "global term not doubled": (SINKHORN, in_step("class_token_losses", global_not_doubled)),
    "local terms alone in the divisor": (SINKHORN, divisor(lambda crops: 2 * crops)),
    "self pairs counted in the divisor": (SINKHORN, divisor(lambda crops: 2 * (crops + 2))),
    "center updated before use": (CENTERING, in_step("teacher_probs", center_before_use)),
    "iBOT center over all patches": (CENTERING, patch_center_over_all_patches),
    "iBOT center: mean of means of images": (CENTERING, patch_center_of_image_means),
    "iBOT uses the center of class tokens": (CENTERING, one_center_for_both),
    "Sinkhorn, 1 iteration": (SINKHORN, iterations(1)),
    "Sinkhorn, 2 iterations": (SINKHORN, iterations(2)),
    "Sinkhorn, 4 iterations": (SINKHORN, iterations(4)),
    "Sinkhorn per teacher view": (SINKHORN, in_step("sinkhorn_knopp", sinkhorn_per_view)),
    "Sinkhorn includes padded rows": (SINKHORN, in_step("sinkhorn_knopp", sinkhorn_with_padding)),
    "Sinkhorn ends with prototypes": (SINKHORN, in_step("sinkhorn_knopp", sinkhorn_ends_with_prototypes)),
}


@pytest.mark.slow  # needs a whole training in float64, and compiles the objective for each mistake
@pytest.mark.parametrize("mistake", OBJECTIVE)
def test_a_mistake_in_the_objective_shows(monkeypatch, mistake):
    name, plant = OBJECTIVE[mistake]
    reference, tokens = exact(name)[0], tokens_of(name)
    with jax.enable_x64(True):
        plant(monkeypatch)
        assert too_large(objective_differences(reference, tokens))


@pytest.mark.slow  # needs two whole trainings in float64
@pytest.mark.parametrize("name", [CENTERING, SINKHORN])
def test_without_a_mistake_nothing_shows_and_koleo_after_the_head_does(name):
    reference, tokens = exact(name)[0], tokens_of(name)
    with jax.enable_x64(True):
        assert not too_large(objective_differences(reference, tokens))
        assert too_large(objective_differences(reference, tokens, tokens_for_koleo="student_global_logits"))


# Mistakes in the networks, and in what they are given.


def student_not_masked(patch):
    original = DINOv2.tokens
    patch.setattr(DINOv2, "tokens", lambda self, crops, masks=None, **options: original(self, crops, None, **options))


def teacher_masked(patch):
    original, masks = DINOv2.tokens, parity.masks_of_step(exact(CENTERING)[0], 0)

    def other(self, crops, given=None, **options):
        whole = crops.shape[2] == exact(CENTERING)[0].config["global_size"]
        return original(self, crops, masks if whole else given, **options)

    patch.setattr(DINOv2, "tokens", other)


def tanh_gelu(patch):
    for module in (layers, head):
        patch.setattr(module, "gelu", lambda x: jax.nn.gelu(x, approximate=True))


def larger_epsilon(patch):
    def given(original):
        def other(self, x):
            self.epsilon = 1e-5
            return original(self, x)

        return other

    for name in ("__call__", "branch"):
        patch.setattr(LayerNorm, name, given(getattr(LayerNorm, name)))


@pytest.mark.slow  # compiles the networks for each mistake
@pytest.mark.parametrize("mistake", [student_not_masked, teacher_masked, tanh_gelu, larger_epsilon])
def test_a_mistake_in_the_networks_shows(monkeypatch, mistake):
    reference, trajectory = exact(CENTERING)
    with jax.enable_x64(True):
        mistake(monkeypatch)
        arrays = parity.intermediates(reference, trajectory, [0])[0]
    stored = reference.group("out/step0")
    assert max(np.abs(arrays[name] - array).max() for name, array in stored.items()) > 3e-5


# Mistakes in the schedules.


def temperature_per_epoch(config):
    return schedules.teacher_temp_schedule(
        config["warmup_teacher_temp"],
        config["teacher_temp"],
        warmup_epochs=config["warmup_teacher_temp_epochs"],
        steps_per_epoch=config["steps_per_epoch"],
    )


def warmup_from_one(config):
    warmup, correct = config["warmup_epochs"] * config["steps_per_epoch"], parity.schedules(config)["lr"]
    return lambda step: jnp.where(step < warmup, config["lr"] * (step + 1) / warmup, correct(step))


def reaching_the_end(kind, base, final):
    def schedule(config):
        total = config["epochs"] * config["steps_per_epoch"]
        return lambda step: (
            config[final] + 0.5 * (config[base] - config[final]) * (1 + jnp.cos(jnp.pi * step / (total - 1)))
        )

    return kind, schedule


WRONG_SCHEDULES = {
    "temperature per epoch": ("teacher_temp", temperature_per_epoch),
    "temperature without warm-up": ("teacher_temp", lambda config: lambda step: config["teacher_temp"]),
    "warm-up (i + 1) / n": ("lr", warmup_from_one),
    "decay divides by n - 1": reaching_the_end("weight_decay", "weight_decay", "weight_decay_end"),
    "momentum divides by n - 1": reaching_the_end("teacher_momentum", "momentum_teacher", "final_momentum_teacher"),
    "momentum constant": ("teacher_momentum", lambda config: lambda step: config["momentum_teacher"]),
    "momentum one step late": (
        "teacher_momentum",
        lambda config: lambda step: parity.schedules(config)["teacher_momentum"](jnp.maximum(step - 1, 0)),
    ),
}


@pytest.mark.parametrize("mistake", WRONG_SCHEDULES)
def test_a_mistake_in_a_schedule_shows(mistake):
    kind, schedule = WRONG_SCHEDULES[mistake]
    reference, _ = exact(CENTERING)
    stored = reference.arrays[f"schedule/{kind}"]
    with jax.enable_x64(True):
        found = np.array([schedule(reference.config)(jnp.asarray(number)) for number in range(len(stored))])
    assert np.abs(found - stored).max() > 1e-5 * np.abs(stored).max()


# slow: each compiles a whole training
@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["iBOT divided by the batch", "center updated before use"])
def test_whole_trainings_expose_mistakes_too(monkeypatch, mistake):
    name, plant = OBJECTIVE[mistake]
    reference = read(name, BUNDLED)
    plant(monkeypatch)
    assert too_large(parity.differences(reference, parity.train(reference, np.float32)))
