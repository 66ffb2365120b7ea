"""Parts of a DINOv2 training on their own, fed with official numbers: quick enough to plant a mistake in each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dinojax.pretraining import dinov2_step, step
from dinojax.pretraining.dinov2_step import Centers, DINOv2
from tests.support import dinov2_parity as parity
from tests.support.reference_files import Reference


def objective_differences(
    reference: Reference, tokens: list[dict[str, np.ndarray]], tokens_for_koleo: str = "class_tokens"
) -> dict[str, float]:
    """Losses, targets and centers of steps 0 and 1, computed from the official logits; float64 is needed.

    Args:
        reference: a file.
        tokens: the result of `intermediates`, for the student's class tokens, which the reference lacks.
        tokens_for_koleo: the name of the arrays there that the student gives as class tokens of global crops.
    """
    config, batch, most = reference.config, reference.config["batch"], parity.most_masked(reference)
    result = {"loss": 0.0, "probs": 0.0, "center": 0.0}
    centers = Centers(*(jnp.zeros(config[head]["n_prototypes"]) for head in ("dino_head", _patch_head(config))))
    for number in range(2):
        stored = reference.group(f"out/step{number}")
        teacher_logits, local, ours = (
            _of_crops(stored[name], batch)
            for name in ("dino_teacher_logits", "student_local_logits", "student_global_logits")
        )
        theirs, patches = (_padded(stored[name], most) for name in ("ibot_teacher_logits", "student_patch_logits"))
        temperature = parity.schedules(config)["teacher_temp"](number)
        crops, masks = parity.crops_of_step(reference, number, np.float64), parity.masks_of_step(reference, number)
        class_tokens = _of_crops(tokens[number][tokens_for_koleo], batch)
        answer, centers = dinov2_step._ask_teacher(
            _answering(class_tokens, teacher_logits[None, ::-1], theirs[None]),
            crops[0][None], masks[None], centers, temperature, most, parity.objective_of(config),
        )  # fmt: skip
        answer = jax.tree.map(lambda x: x[0], answer)
        student = _answering(class_tokens, jnp.concatenate([ours, local]), patches)
        loss_of = dinov2_step._make_student_loss(_always(student), parity.objective_of(config), remat=False)
        _, terms = loss_of(None, [*crops, masks], answer, None)
        for name, value in parity.logged(config, terms).items():
            result["loss"] = max(result["loss"], abs(value - reference.arrays[f"out/{name}"][number]))
        for name, found in (("dino", answer.class_targets[::-1]), ("ibot", answer.patch_targets)):
            probs = stored[f"{name}_teacher_probs"]
            rows = found.reshape(-1, found.shape[-1])[: len(probs)]
            result["probs"] = max(result["probs"], np.abs(rows - probs).max())
        if config["centering"] == "centering":
            for name, center in (("dino", centers.classes), ("ibot", centers.patches)):
                used = reference.arrays[f"out/{name}_center_used"][number + 1]
                result["center"] = max(result["center"], np.abs(center - used).max())
    return {name: float(value) for name, value in result.items()}


def _patch_head(config: dict[str, Any]) -> str:
    return "ibot_head" if config["ibot_separate_head"] else "dino_head"


def _of_crops(rows: np.ndarray, batch: int) -> jax.Array:
    return jnp.asarray(rows.reshape(-1, batch, rows.shape[-1]), float)


def _padded(rows: np.ndarray, length: int) -> jax.Array:
    return jnp.asarray(np.pad(rows, ((0, length - len(rows)), (0, 0))), float)


def _always(network: DINOv2) -> Callable[[Any], DINOv2]:
    return lambda parameters: network


def _answering(class_tokens: jax.Array, logits: jax.Array, patch_logits: jax.Array) -> DINOv2:
    """A network that gives these class tokens for the first crops that it sees, and these logits for everything."""
    pending = [class_tokens]

    class Answering(DINOv2):
        def __init__(self):
            pass

        def tokens(self, crops, masks=None, *, key=None, remat=False):
            found = pending.pop() if pending else jnp.zeros((*crops.shape[:2], class_tokens.shape[-1]))
            return found, jnp.zeros((*crops.shape[:2], 1, 1))  # of no consequence: the logits of patches are given

        def logits(self, class_tokens, patch_tokens):
            return logits, patch_logits

    return Answering()


def optimizer_differences(
    reference: Reference, trajectory: parity.Trajectory, optimizer: Any = None, momentum: Any = None
) -> dict[str, float]:
    """Student and teacher after two and after all steps, from the gradients of a correct trajectory."""
    config = reference.config
    optimizer = optimizer or parity.optimizer_of(config)
    momentum = momentum or parity.schedules(config)["teacher_momentum"]
    state, result = parity.start(reference, trajectory.model, optimizer), {}
    for number, gradients in enumerate(trajectory.gradients):
        state = step.updated_state(state, gradients, optimizer, momentum, state.center)
        group = {1: "after_2_steps", len(trajectory.gradients) - 1: "final"}.get(number)
        if group:
            for kind, difference in parity.state_differences(reference, group, trajectory.model, state).items():
                result[kind] = max(result.get(kind, 0.0), float(difference))
    return result
