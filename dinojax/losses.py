"""DINO's loss and its center, as functions of arrays; no state.

Source: "Emerging Properties in Self-Supervised Vision Transformers" (arXiv 2104.14294), Eq. 3 and 4, and
facebookresearch/dino 7c446df `main_dino.DINOLoss`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def teacher_probs(
    logits: Float[Array, "global_crops batch prototypes"],
    center: Float[Array, " prototypes"],
    temperature: Float[Array, ""] | float,
) -> Float[Array, "global_crops batch prototypes"]:
    """What the teacher says: its logits, centered and sharpened. No gradient passes. Float32 at least."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jax.lax.stop_gradient(jax.nn.softmax((logits - center) / temperature, axis=-1))


def updated_center(
    center: Float[Array, " prototypes"],
    logits: Float[Array, "global_crops batch prototypes"],
    momentum: float = 0.9,
) -> Float[Array, " prototypes"]:
    """The moving average of the raw teacher logits, after the loss of the step has used the old one."""
    mean = jnp.mean(logits, axis=(0, 1), dtype=center.dtype)
    return momentum * center + (1 - momentum) * mean


def dino_loss(
    student_logits: Float[Array, "crops batch prototypes"],
    teacher_probs: Float[Array, "global_crops batch prototypes"],
    student_temp: float = 0.1,
) -> Float[Array, ""]:
    """Cross-entropy between teacher and student over all pairs of crops but the equal ones, averaged; in nats.

    The first crops of the student are the teacher's global crops, in the same order. No pair is ever formed: a
    student crop meets the sum of all teacher crops, less its own, and its log-sum-exp is taken once.

    Args:
        student_logits: raw, of every crop, global ones first.
        teacher_probs: from `teacher_probs`.
        student_temp: divides the student's logits.

    Raises:
        ValueError: there is no pair, or fewer student than teacher crops.

    Source: arXiv 2104.14294, Eq. 3.
    """
    crops, global_crops = student_logits.shape[0], teacher_probs.shape[0]
    pairs = global_crops * (crops - 1)
    if pairs < 1 or crops < global_crops:
        raise ValueError(f"{crops} student crops and {global_crops} teacher crops make no pair of different crops")
    own = jnp.pad(teacher_probs, ((0, crops - global_crops), (0, 0), (0, 0)))
    target = teacher_probs.sum(axis=0) - own
    logits = student_logits.astype(target.dtype) / student_temp
    # Each crop's targets sum to the number of teacher crops it is compared with.
    partners = target.sum(axis=-1)
    return jnp.mean(partners * jax.nn.logsumexp(logits, axis=-1) - jnp.sum(target * logits, axis=-1)) * crops / pairs
