"""The DINO step: student and teacher on all crops, loss, optimiser, moving averages, as one pure function.

Source: facebookresearch/dino 7c446df `main_dino.train_one_epoch`, `utils.MultiCropWrapper`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from dinojax.head import DINOHead
from dinojax.losses import dino_loss, teacher_probs, updated_center
from dinojax.schedules import Schedule
from dinojax.vit import VisionTransformer

Crops = Float[Array, "_crops batch _height _width channels"]


class DINO(nnx.Module):
    """A backbone and a head; crops of one size pass the backbone together, all crops the head together."""

    def __init__(self, backbone: VisionTransformer, head: DINOHead):
        self.backbone = backbone
        self.head = head

    def __call__(
        self, crops: Sequence[Crops], *, key: Key[Array, ""] | None = None
    ) -> Float[Array, "crops batch prototypes"]:
        """Logits of groups of crops, each group of one size, in the order given."""
        keys = [None] * len(crops) if key is None else list(jax.random.split(key, len(crops)))
        cls_tokens = [
            self.backbone(group.reshape(-1, *group.shape[2:]), key=group_key).cls_token
            for group, group_key in zip(crops, keys)
        ]
        logits = self.head(jnp.concatenate(cls_tokens))
        return logits.reshape(sum(group.shape[0] for group in crops), -1, logits.shape[-1])


class TrainState(NamedTuple):
    """All that changes from step to step; one pytree, which is the checkpoint."""

    step: Int[Array, ""]
    student: PyTree
    teacher: PyTree
    opt_state: optax.OptState
    center: Float[Array, " prototypes"]


TrainStep = Callable[..., tuple[TrainState, dict[str, Array]]]


def init_state(model: DINO, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the teacher starts as a copy of the student."""
    student = nnx.state(model, nnx.Param)
    prototypes = model.head.last_layer.weight_v.shape[0]
    dtype = model.head.last_layer.weight_v.dtype
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        student=student,
        teacher=jax.tree.map(jnp.copy, student),  # donated states must not hold one buffer twice
        opt_state=optimizer.init(student),
        center=jnp.zeros(prototypes, dtype),
    )


def make_train_step(
    model: DINO,
    optimizer: optax.GradientTransformation,
    *,
    teacher_temp: Schedule,
    teacher_momentum: Schedule,
    student_temp: float = 0.1,
    center_momentum: float = 0.9,
) -> TrainStep:
    """Returns `train_step(state, crops, key) -> (state, metrics)`, pure, to be jitted by the caller.

    Args:
        model: gives the architecture alone; the parameters are in the state.
        optimizer: see `dinojax.optim.dino_optimizer`.
        teacher_temp: step → the teacher's temperature.
        teacher_momentum: step → weight of the old teacher in the moving average.
        student_temp: divides the student's logits.
        center_momentum: weight of the old center.

    The step takes groups of crops, the global ones first, and a key for drop path (None for none).
    """
    graphdef, _ = nnx.split(model, nnx.Param)

    def train_step(
        state: TrainState, crops: Sequence[Crops], key: Key[Array, ""] | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        teacher_logits = nnx.merge(graphdef, state.teacher)(crops[:1])
        targets = teacher_probs(teacher_logits, state.center, teacher_temp(state.step))

        def loss_of(student: PyTree) -> Array:
            return dino_loss(nnx.merge(graphdef, student)(crops, key=key), targets, student_temp)

        loss, gradients = jax.value_and_grad(loss_of)(state.student)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.student)
        student = optax.apply_updates(state.student, updates)
        teacher = optax.incremental_update(student, state.teacher, 1 - teacher_momentum(state.step))
        center = updated_center(state.center, teacher_logits, center_momentum)
        return TrainState(state.step + 1, student, teacher, opt_state, center), {"loss": loss}

    return train_step
