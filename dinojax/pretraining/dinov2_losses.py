"""DINOv2's losses, Sinkhorn-Knopp targets and center of patch tokens, as stateless functions of arrays.

Targets by centering are DINO's: `dinojax.pretraining.losses.teacher_probs`, with a center of its own for class tokens
(`updated_center`) and for patch tokens (`updated_patch_center`).

Source: "DINOv2: Learning Robust Visual Features without Supervision" (arXiv 2304.07193), section 4, and
facebookresearch/dinov2 b8931f7 `dinov2/loss/`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dinojax.parallel import merge
from dinojax.precision import at_least_float32


def sinkhorn_knopp(
    logits: Float[Array, "rows prototypes"],
    temperature: Float[Array, ""] | float,
    valid: Bool[Array, " rows"] | None = None,
    iterations: int = 3,
) -> Float[Array, "rows prototypes"]:
    """The teacher's probabilities, balanced so that all prototypes are used about equally; without a gradient.

    Each iteration first scales every prototype to the same sum, then every row to the sum one. It is computed with
    logarithms, so that no sum underflows, in float32 at least.

    Args:
        logits: the teacher's raw logits of all rows that are balanced together.
        temperature: divides the logits.
        valid: rows that count; the others fill up the array, change nothing, and get zeros. None counts all.
        iterations: number of iterations, one or more.

    Raises:
        ValueError: `iterations` is less than one.

    Source: `sinkhorn_knopp_teacher` of `DINOLoss` and `iBOTPatchLoss`; the number of rows that upstream passes cancels.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations} is less than one")
    logits = jax.lax.stop_gradient(logits).astype(at_least_float32(logits.dtype))
    counts = jnp.ones(len(logits), bool) if valid is None else valid
    # From the largest of each row down: what matters is near zero, where floats are dense.
    largest = jnp.max(logits, axis=1)
    scores = (logits - largest[:, None]) / temperature
    # Logarithms of the divisors of each row and each prototype. The start is that of exp(logits / temperature).
    of_row, of_prototype = (jnp.max(largest) - largest) / temperature, jnp.zeros_like(logits[0])
    for _ in range(iterations):
        of_prototype = jax.nn.logsumexp(scores - of_row[:, None], axis=0, where=counts[:, None])
        of_prototype = jnp.where(jnp.any(counts), of_prototype, 0)
        of_row = jax.nn.logsumexp(scores - of_prototype[None], axis=1)
    probs = jnp.exp(scores - of_prototype[None] - of_row[:, None])
    return jnp.where(counts[:, None], probs, 0)


def class_token_losses(
    local_logits: Float[Array, "local_crops batch prototypes"],
    global_logits: Float[Array, "2 batch prototypes"],
    teacher_probs: Float[Array, "2 batch prototypes"],
    student_temp: float = 0.1,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The cross-entropies of class tokens in nats, of local and of global crops, over one divisor.

    A local crop meets both teacher crops, a global crop the other one. The divisor is the number of all these pairs, so
    the two results add up to the mean cross-entropy over pairs and images. Without local crops it is 3 instead of 2, as
    upstream.

    Args:
        local_logits: the student's raw logits; there may be no local crops.
        global_logits: the student's raw logits, in the order of the teacher's crops.
        teacher_probs: the result of `sinkhorn_knopp` or `teacher_probs`.
        student_temp: divides the student's logits.
    """
    crops, batch, _ = local_logits.shape
    divisor = (max(2 * crops, 1) + 2) * batch
    both = teacher_probs.sum(axis=0, keepdims=True)
    local_loss = _cross_entropy(local_logits, both, student_temp).sum() / divisor
    return local_loss, _cross_entropy(global_logits, teacher_probs[::-1], student_temp).sum() / divisor


def ibot_loss(
    student_logits: Float[Array, "masked prototypes"],
    teacher_probs: Float[Array, "masked prototypes"],
    weights: Float[Array, " masked"],
    images: int,
    student_temp: float = 0.1,
) -> Float[Array, ""]:
    """The cross-entropy of masked patches in nats, averaged over the patches of an image, then over all images.

    Images without a masked patch count as zero.

    Args:
        student_logits: raw logits of masked patches.
        teacher_probs: targets of the same patches.
        weights: 1 / (masked patches of the image), and 0 in rows that fill up the array.
        images: number of images in the batch, with or without a mask.
        student_temp: divides the student's logits.
    """
    losses = _cross_entropy(student_logits, teacher_probs, student_temp)
    return jnp.sum(losses * weights.astype(losses.dtype)) / images


def updated_patch_center(
    center: Float[Array, " prototypes"],
    logits: Float[Array, "masked prototypes"],
    valid: Bool[Array, " masked"],
    momentum: float = 0.9,
) -> Float[Array, " prototypes"]:
    """The moving average of the raw teacher logits of masked patches; `momentum` is the weight of the old center.

    All masked patches of the batch count alike. Without any, the center stays as it is, where upstream's becomes NaN.
    """
    count = jnp.sum(valid)
    total = jnp.sum(jnp.where(valid[:, None], logits, 0), axis=0, dtype=center.dtype)
    mean = total / jnp.maximum(count, 1).astype(center.dtype)
    return jnp.where(count > 0, momentum * center + (1 - momentum) * mean, center)


def koleo_loss(features: Float[Array, "images dim"]) -> Float[Array, ""]:
    """The mean of -log of the distance from each image to its nearest neighbour, between features of length one.

    It spreads the features evenly. The gradient also moves the neighbours. Computed in float32 at least.

    Source: `KoLeoLoss`; 1e-8 is added to the differences and to the distance.

    Raises:
        ValueError: there is one image only, which has no neighbour.
    """
    images = len(features)
    if images < 2:
        raise ValueError(f"KoLeo was given {images} image, which has no neighbour: give it two images or more")
    features = features.astype(at_least_float32(features.dtype))
    squared = jnp.sum(features * features, axis=-1, keepdims=True)
    unit = features / jnp.sqrt(jnp.maximum(squared, 1e-16))
    similarity = jnp.matmul(unit, unit.T, precision="highest")
    neighbours = jnp.argmax(jnp.where(jnp.eye(images, dtype=bool), -jnp.inf, similarity), axis=1)
    distances = jnp.linalg.norm(unit - unit[neighbours] + 1e-8, axis=-1)
    return -jnp.mean(jnp.log(distances + 1e-8))


def koleo_loss_in_groups(features: Float[Array, "crops images dim"], group: int | None = None) -> Float[Array, ""]:
    """KoLeo of each crop, averaged over groups of neighbouring images, summed over crops.

    Args:
        features: of several crops of each image.
        group: number of images among which neighbours are looked for; None takes all.

    Raises:
        ValueError: `group` does not divide the number of images.
    """
    crops, images, dim = features.shape
    group = images if group is None else group
    if images % group:
        raise ValueError(f"koleo_group={group} does not divide the {images} images of a part")
    return crops * jnp.mean(jax.vmap(koleo_loss)(merge(features.reshape(crops, -1, group, dim), keep=2)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cross_entropy(student_logits: Array, targets: Array, student_temp: float) -> Array:
    """Cross-entropy of each row, for targets "… rows prototypes" that may be shared along the first axis.

    The gradient is written by hand, so that nothing as large as the logits is kept except the logits.
    """
    return _cross_entropy_forward(student_logits, targets, student_temp)[0]


def _cross_entropy_forward(student_logits: Array, targets: Array, student_temp: float) -> tuple[Array, tuple]:
    logits = _scaled(student_logits, student_temp)
    log_sums = jax.nn.logsumexp(logits, axis=-1)
    losses = targets.sum(axis=-1) * log_sums - jnp.sum(targets * logits, axis=-1)
    return losses, (student_logits, targets, log_sums)


def _cross_entropy_backward(student_temp: float, saved: tuple, cotangent: Array) -> tuple[Array, Array]:
    student_logits, targets, log_sums = saved
    probs = jnp.exp(_scaled(student_logits, student_temp) - log_sums[..., None])
    gradient = cotangent[..., None] / student_temp * (targets.sum(axis=-1, keepdims=True) * probs - targets)
    return gradient.astype(student_logits.dtype), jnp.zeros_like(targets)


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _scaled(logits: Array, temperature: float) -> Array:
    """Logits over the temperature, in float32 at least."""
    return logits.astype(at_least_float32(logits.dtype)) / temperature
