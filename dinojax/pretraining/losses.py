"""DINO's loss and its center as stateless functions of arrays.

Source: "Emerging Properties in Self-Supervised Vision Transformers" (arXiv 2104.14294), Eq. 3 and 4, and
facebookresearch/dino 7c446df `main_dino.DINOLoss`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dinojax.precision import at_least_float32


def teacher_probs(
    logits: Float[Array, "*rows prototypes"],
    center: Float[Array, " prototypes"],
    temperature: Float[Array, ""] | float,
) -> Float[Array, "*rows prototypes"]:
    """The teacher's probabilities: the softmax of its centered logits over the temperature, without a gradient.

    Computed in float32 at least.
    """
    logits = logits.astype(at_least_float32(logits.dtype))
    center = jnp.expand_dims(center, tuple(range(logits.ndim - 1)))
    return jax.lax.stop_gradient(jax.nn.softmax((logits - center) / temperature, axis=-1))


def updated_center(
    center: Float[Array, " prototypes"],
    logits: Float[Array, "global_crops batch prototypes"],
    momentum: float = 0.9,
) -> Float[Array, " prototypes"]:
    """The moving average of the raw teacher logits; `momentum` is the weight of the old center.

    The loss of the step uses the old center.
    """
    mean = jnp.mean(logits, axis=(0, 1), dtype=center.dtype)
    return momentum * center + (1 - momentum) * mean


def dino_loss(
    student_logits: Float[Array, "crops batch prototypes"],
    teacher_probs: Float[Array, "global_crops batch prototypes"],
    student_temp: float = 0.1,
) -> Float[Array, ""]:
    """Mean cross-entropy in nats between teacher and student, over all pairs of different crops.

    The first crops of the student are the teacher's global crops, in the same order. No pair is formed: a student crop
    meets the sum of all teacher crops but its own, and its log-sum-exp is computed once. The gradient is written by
    hand, so that nothing as large as the logits is kept except the logits. It reaches only the student.

    Args:
        student_logits: raw logits of every crop, global crops first.
        teacher_probs: the result of `teacher_probs`.
        student_temp: divides the student's logits.

    Raises:
        ValueError: there is no pair, or fewer student than teacher crops.

    Source: arXiv 2104.14294, Eq. 3.
    """
    pairs = _count_pairs(student_logits.shape[0], teacher_probs.shape[0])
    return _summed_cross_entropy(student_logits, teacher_probs, student_temp) / (pairs * student_logits.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _summed_cross_entropy(student_logits: Array, teacher_probs: Array, student_temp: float) -> Array:
    """Sum of the cross-entropy over all pairs and images."""
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
    """`dino_loss` for logits that do not fit into memory: it computes `chunk` prototypes at a time.

    The logits are computed again for the gradient, which reaches only the student.

    Args:
        student: embeddings of every crop from the student's head (`DINOHead.embed`), global crops first.
        student_prototypes: effective weight of the student's last layer.
        teacher: embeddings of the global crops from the teacher's head.
        teacher_prototypes: effective weight of the teacher's last layer.
        center: subtracted from the teacher's logits.
        teacher_temp: divides the centered logits of the teacher.
        student_temp: divides the student's logits.
        chunk: number of prototypes in a chunk; it must divide the number of prototypes.

    Returns:
        The loss and the mean entropy of the teacher's probabilities, both in nats.

    Raises:
        ValueError: as for `dino_loss`, or `chunk` does not divide the number of prototypes.
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
    """Mean entropy of probability distributions, in nats."""
    return jnp.mean(jnp.sum(jax.scipy.special.entr(probs), axis=-1))


def _count_pairs(crops: int, global_crops: int) -> int:
    pairs = global_crops * (crops - 1)
    if pairs < 1 or crops < global_crops:
        raise ValueError(f"{crops} student crops and {global_crops} teacher crops make no pair of different crops")
    return pairs


def _targets(teacher_probs: Array, crops: int) -> Array:
    """The target of each student crop: the sum of all teacher crops but its own."""
    own = jnp.pad(teacher_probs, ((0, crops - len(teacher_probs)), (0, 0), (0, 0)))
    return teacher_probs.sum(axis=0, keepdims=True) - own


def _scaled(logits: Array, temperature: float) -> Array:
    """Logits over the temperature, in float32 at least."""
    return logits.astype(at_least_float32(logits.dtype)) / temperature


def _products(x: Array, weight: Array) -> Array:
    """Logits in float32 at least."""
    dtype = at_least_float32(x.dtype)
    return jnp.einsum("cbd,kd->cbk", x, weight, preferred_element_type=dtype)
