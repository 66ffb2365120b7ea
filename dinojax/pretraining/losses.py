"""DINO's loss and its center, as functions of arrays; no state.

Source: "Emerging Properties in Self-Supervised Vision Transformers" (arXiv 2104.14294), Eq. 3 and 4, and
facebookresearch/dino 7c446df `main_dino.DINOLoss`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dinojax.precision import at_least_float32


def teacher_probs(
    logits: Float[Array, "global_crops batch prototypes"],
    center: Float[Array, " prototypes"],
    temperature: Float[Array, ""] | float,
) -> Float[Array, "global_crops batch prototypes"]:
    """What the teacher says: its logits, centered and sharpened. No gradient passes. Float32 at least."""
    logits = logits.astype(at_least_float32(logits.dtype))
    return jax.lax.stop_gradient(jax.nn.softmax((logits - center[None, None]) / temperature, axis=-1))


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
    student crop meets the sum of all teacher crops, less its own, and its log-sum-exp is taken once. The gradient is
    written out, so that nothing of the logits' size is kept but the logits, in the dtype they have. It reaches the
    student alone.

    Args:
        student_logits: raw, of every crop, global ones first.
        teacher_probs: from `teacher_probs`.
        student_temp: divides the student's logits.

    Raises:
        ValueError: there is no pair, or fewer student than teacher crops.

    Source: arXiv 2104.14294, Eq. 3.
    """
    pairs = _count_pairs(student_logits.shape[0], teacher_probs.shape[0])
    return _summed_cross_entropy(student_logits, teacher_probs, student_temp) / (pairs * student_logits.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _summed_cross_entropy(student_logits: Array, teacher_probs: Array, student_temp: float) -> Array:
    """Over all pairs and images."""
    return _summed_forward(student_logits, teacher_probs, student_temp)[0]


def _summed_forward(student_logits: Array, teacher_probs: Array, student_temp: float) -> tuple[Array, tuple]:
    target, logits = _targets(teacher_probs, len(student_logits)), _scaled(student_logits, student_temp)
    log_sums = jax.nn.logsumexp(logits, axis=-1)
    # Each crop's targets sum to the number of teacher crops it is compared with.
    loss = jnp.sum(target.sum(axis=-1) * log_sums) - jnp.sum(target * logits)
    return loss, (student_logits, teacher_probs, log_sums)


def _summed_backward(student_temp: float, saved: tuple, cotangent: Array) -> tuple[Array, Array]:
    student_logits, teacher_probs, log_sums = saved
    target, logits = _targets(teacher_probs, len(student_logits)), _scaled(student_logits, student_temp)
    probs = jnp.exp(logits - log_sums[..., None])
    gradient = cotangent / student_temp * (target.sum(axis=-1, keepdims=True) * probs - target)
    return gradient.astype(student_logits.dtype), jnp.zeros_like(teacher_probs)


_summed_cross_entropy.defvjp(_summed_forward, _summed_backward)


def dino_loss_in_chunks(
    student: Float[Array, "crops batch dim"],
    student_prototypes: Float[Array, "prototypes dim"],
    teacher: Float[Array, "global_crops batch dim"],
    teacher_prototypes: Float[Array, "prototypes dim"],
    center: Float[Array, " prototypes"],
    teacher_temp: Float[Array, ""] | float,
    student_temp: float = 0.1,
    *,
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The same loss where logits do not fit: they are formed `chunk` prototypes at a time, and again for the gradient.

    Args:
        student: what the head compares with the student's prototypes, of every crop, global ones first.
        student_prototypes: the last layer's effective weight.
        teacher: likewise, of the global crops; no gradient reaches it or the two below.
        teacher_prototypes: likewise.
        center: subtracted from the teacher's logits.
        teacher_temp: divides them then.
        student_temp: divides the student's logits.
        chunk: divides the number of prototypes.

    Returns:
        The loss and the mean entropy of the teacher's probabilities, both in nats.

    Raises:
        ValueError: as `dino_loss`, or `chunk` does not divide the number of prototypes.
    """
    (crops, batch, _), (prototypes, _) = student.shape, student_prototypes.shape
    pairs = _count_pairs(crops, len(teacher))
    if chunk < 1 or prototypes % chunk:
        raise ValueError(f"chunk={chunk} does not divide {prototypes} prototypes")
    teacher, teacher_prototypes, center = jax.lax.stop_gradient((teacher, teacher_prototypes, center))
    pieces = jax.tree.map(
        lambda x: x.reshape(prototypes // chunk, chunk, *x.shape[1:]), (student_prototypes, teacher_prototypes, center)
    )

    def teacher_logits(weight: Array, center: Array) -> Array:
        return (_products(teacher, weight) - center[None, None]) / teacher_temp

    log_sums = jax.nn.logsumexp(
        jax.lax.map(lambda piece: jax.nn.logsumexp(teacher_logits(*piece[1:]), axis=-1), pieces), axis=0
    )

    @jax.checkpoint
    def of_piece(piece: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        log_probs = teacher_logits(*piece[1:]) - log_sums[..., None]
        probs = jnp.exp(log_probs)
        logits = _products(student, piece[0]) / student_temp
        entropy = -jnp.sum(probs * log_probs)
        return jax.nn.logsumexp(logits, axis=-1), jnp.sum(_targets(probs, crops) * logits), entropy

    student_sums, products, entropies = jax.lax.map(of_piece, pieces)
    partners = len(teacher) - (jnp.arange(crops) < len(teacher))
    loss = jnp.sum(partners[:, None] * jax.nn.logsumexp(student_sums, axis=0)) - products.sum()
    return loss / (pairs * batch), entropies.sum() / (len(teacher) * batch)


def entropy(probs: Float[Array, "*batch prototypes"]) -> Float[Array, ""]:
    """Mean entropy of distributions, in nats."""
    return jnp.mean(jnp.sum(jax.scipy.special.entr(probs), axis=-1))


def _count_pairs(crops: int, global_crops: int) -> int:
    pairs = global_crops * (crops - 1)
    if pairs < 1 or crops < global_crops:
        raise ValueError(f"{crops} student crops and {global_crops} teacher crops make no pair of different crops")
    return pairs


def _targets(teacher_probs: Array, crops: int) -> Array:
    """What each student crop is compared with: all teacher crops summed, less its own."""
    own = jnp.pad(teacher_probs, ((0, crops - len(teacher_probs)), (0, 0), (0, 0)))
    return teacher_probs.sum(axis=0, keepdims=True) - own


def _scaled(logits: Array, temperature: float) -> Array:
    """Divided by the temperature, in float32 at least."""
    return logits.astype(at_least_float32(logits.dtype)) / temperature


def _products(x: Array, weight: Array) -> Array:
    """Logits in float32 at least."""
    dtype = at_least_float32(x.dtype)
    return jnp.einsum("cbd,kd->cbk", x, weight, preferred_element_type=dtype)
