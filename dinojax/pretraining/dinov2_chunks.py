"""DINOv2's targets and cross-entropies for logits that do not fit into memory: some prototypes at a time.

The numbers are those of `dinojax.pretraining.dinov2_losses` and `dinojax.pretraining.losses`. What is kept of the
teacher are embeddings and one divisor for each row and each prototype, from which its probabilities are computed again.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dinojax.models.head import DINOHead
from dinojax.parallel import by_rows, merge, unmerge
from dinojax.precision import at_least_float32
from dinojax.pretraining.dinov2_losses import updated_patch_center


class RowTargets(NamedTuple):
    """The teacher's side of the targets, with one entry a row; any axes may stand in front of all arrays.

    The probability of prototype k is exp((logit_k - largest) / temperature - of_prototype_k - of_row).
    """

    embedding: Float[Array, "*rows dim"]
    """Output of the teacher's head before the prototypes (`DINOHead.embed`)."""
    largest: Float[Array, "*rows"]
    """The largest logit of the row."""
    of_row: Float[Array, "*rows"]
    """Logarithm of the divisor of the row."""
    entropy: Float[Array, "*rows"]
    """Entropy of the probabilities, in nats."""


class PrototypeTargets(NamedTuple):
    """The teacher's side of the targets, with one entry a prototype, in pieces that are computed together."""

    weight: Float[Array, "pieces chunk dim"]
    """Effective weight of the teacher's last layer."""
    of_prototype: Float[Array, "pieces chunk"]
    """Logarithm of the divisor of the prototype; for centering, the center over the temperature."""
    temperature: Float[Array, ""]
    """Divides the logits."""


def centering_in_chunks(
    embedding: Float[Array, "rows dim"],
    weight: Float[Array, "prototypes dim"],
    center: Float[Array, " prototypes"],
    temperature: Float[Array, ""] | float,
    *,
    chunk: int,
) -> tuple[RowTargets, PrototypeTargets]:
    """The targets of `teacher_probs`.

    Args:
        embedding: outputs of the teacher's head before the prototypes.
        weight: effective weight of the teacher's last layer.
        center: subtracted from the logits.
        temperature: divides the centered logits.
        chunk: number of prototypes whose logits are computed together; it must divide their number.

    Raises:
        ValueError: `chunk` does not divide the number of prototypes.
    """
    embedding, pieces, temperature, largest = _prepared(embedding, weight, temperature, chunk)
    of_prototype = _in_pieces((jax.lax.stop_gradient(center) / temperature).astype(largest.dtype), chunk)

    def of_piece(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        weight, offset = piece
        return _of_rows((_logits(embedding, weight) - largest[:, None]) / temperature - offset[None])

    rows = _over_pieces(*jax.lax.map(of_piece, (pieces, of_prototype)))
    return RowTargets(embedding, largest, *rows), PrototypeTargets(pieces, of_prototype, temperature)


def sinkhorn_knopp_in_chunks(
    embedding: Float[Array, "rows dim"],
    weight: Float[Array, "prototypes dim"],
    temperature: Float[Array, ""] | float,
    valid: Bool[Array, " rows"] | None = None,
    iterations: int = 3,
    *,
    chunk: int,
) -> tuple[RowTargets, PrototypeTargets]:
    """The targets of `sinkhorn_knopp`; the logits are computed again in each iteration.

    Rows that are not valid get probabilities instead of zeros: what they are used for needs a weight of zero.

    Args:
        embedding: outputs of the teacher's head before the prototypes.
        weight: effective weight of the teacher's last layer.
        temperature: divides the logits.
        valid: rows that count. None counts all.
        iterations: number of iterations, one or more.
        chunk: number of prototypes whose logits are computed together; it must divide their number.

    Raises:
        ValueError: `chunk` does not divide the number of prototypes, or `iterations` is less than one.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations} is less than one")
    embedding, pieces, temperature, largest = _prepared(embedding, weight, temperature, chunk)
    counts = jnp.ones(len(embedding), bool) if valid is None else valid

    def balance(of_row: Array) -> tuple[Array, tuple[Array, Array]]:
        """Prototypes scaled to the same sum, then rows to the sum one."""

        def of_piece(weight: Array) -> tuple[Array, tuple[Array, Array]]:
            scores = (_logits(embedding, weight) - largest[:, None]) / temperature
            of_prototype = jax.nn.logsumexp(scores - of_row[:, None], axis=0, where=counts[:, None])
            of_prototype = jnp.where(jnp.any(counts), of_prototype, 0)
            return of_prototype, _of_rows(scores - of_prototype[None])

        of_prototype, rows = jax.lax.map(of_piece, pieces)
        return of_prototype, _over_pieces(*rows)

    of_row = (jnp.max(largest) - largest) / temperature
    for _ in range(iterations):
        of_prototype, (of_row, entropy) = balance(of_row)
    return RowTargets(embedding, largest, of_row, entropy), PrototypeTargets(pieces, of_prototype, temperature)


def targets_in_chunks(
    head: DINOHead,
    tokens: Float[Array, "*rows dim"],
    valid: Bool[Array, "*rows"],
    center: Float[Array, " prototypes"],
    temperature: Float[Array, ""] | float,
    *,
    centering: str,
    center_momentum: float,
    chunk: int,
) -> tuple[RowTargets, PrototypeTargets, Float[Array, " prototypes"]]:
    """The targets of the teacher's head, "centering" or "sinkhorn_knopp" over all rows, and the center afterwards."""
    embedding, weight = head.embed(merge(tokens, keep=1)), head.last_layer.weight()
    valid = merge(valid, keep=0)
    if centering == "centering":
        rows, prototypes = centering_in_chunks(embedding, weight, center, temperature, chunk=chunk)
        total = jnp.sum(jnp.where(valid[:, None], embedding, 0), axis=0, dtype=center.dtype)
        # The mean of the logits is the product with the mean embedding.
        logits = weight.astype(center.dtype) @ (total / jnp.maximum(valid.sum(), 1).astype(center.dtype))
        center = updated_patch_center(center, logits[None], jnp.any(valid)[None], center_momentum)
    else:
        rows, prototypes = sinkhorn_knopp_in_chunks(embedding, weight, temperature, valid, chunk=chunk)
    return jax.tree.map(lambda x: unmerge(x, tokens.shape[:-1]), rows), prototypes, center


def class_token_losses_in_chunks(
    head: DINOHead,
    tokens: Float[Array, "crops batch dim"],
    rows: RowTargets,
    prototypes: PrototypeTargets,
    student_temp: float = 0.1,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`class_token_losses` of the student's head and class tokens, of which the first two crops are the global ones."""
    local_crops, batch = len(tokens) - 2, tokens.shape[1]

    def targets_of(probs: Array) -> Array:
        both = probs.sum(axis=0, keepdims=True)
        return jnp.concatenate([probs[::-1], jnp.broadcast_to(both, (local_crops, *both.shape[1:]))])

    losses = cross_entropy_in_chunks(head, tokens, rows, prototypes, targets_of, student_temp)
    divisor = (max(2 * local_crops, 1) + 2) * batch
    return losses[2:].sum() / divisor, losses[:2].sum() / divisor


def ibot_loss_in_chunks(
    head: DINOHead,
    patches: Float[Array, "masked dim"],
    rows: RowTargets,
    prototypes: PrototypeTargets,
    weights: Float[Array, " masked"],
    images: int,
    student_temp: float = 0.1,
) -> Float[Array, ""]:
    """`ibot_loss` of the student's head and masked patches."""
    rows = jax.tree.map(lambda x: x[None], rows)
    losses = cross_entropy_in_chunks(head, patches[None], rows, prototypes, lambda probs: probs, student_temp)[0]
    return jnp.sum(losses * weights.astype(losses.dtype)) / images


def cross_entropy_in_chunks(
    head: DINOHead,
    tokens: Float[Array, "crops rows dim"],
    rows: RowTargets,
    prototypes: PrototypeTargets,
    targets_of: Callable[[Float[Array, "views rows chunk"]], Float[Array, "crops rows chunk"]],
    student_temp: float = 0.1,
) -> Float[Array, "crops rows"]:
    """The cross-entropy in nats of each row; the logits are computed again for the gradient.

    Args:
        head: of the student.
        tokens: what the student's head takes.
        rows: of the teacher, with the axes "views rows"; it gets no gradient.
        prototypes: of the teacher, in as many pieces as those of the student are computed in; it gets no gradient.
        targets_of: each crop's targets from the probabilities of the teacher's views.
        student_temp: divides the student's logits.
    """
    rows, prototypes = jax.lax.stop_gradient((rows, prototypes))
    student, weight = by_rows(head.embed, tokens), _in_pieces(head.last_layer.weight(), prototypes.weight.shape[1])

    @jax.checkpoint
    def of_piece(piece: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        ours, theirs, of_prototype = piece
        scores = (_logits(rows.embedding, theirs) - rows.largest[..., None]) / prototypes.temperature
        targets = targets_of(jnp.exp(scores - of_prototype[None, None] - rows.of_row[..., None]))
        logits = _logits(student, ours) / student_temp
        return jax.nn.logsumexp(logits, axis=-1), jnp.sum(targets * logits, axis=-1), jnp.sum(targets, axis=-1)

    pieces = (weight, prototypes.weight, prototypes.of_prototype)
    log_sums, products, totals = jax.lax.map(of_piece, pieces)
    return totals.sum(axis=0) * jax.nn.logsumexp(log_sums, axis=0) - products.sum(axis=0)


def _prepared(
    embedding: Array, weight: Array, temperature: Array | float, chunk: int
) -> tuple[Array, Array, Array, Array]:
    """Embeddings, prototypes in pieces, temperature, all without a gradient; and the largest logit of each row."""
    embedding, weight = jax.lax.stop_gradient((embedding, weight))
    pieces = _in_pieces(weight, chunk)
    largest = jax.lax.map(lambda piece: jnp.max(_logits(embedding, piece), axis=1), pieces).max(axis=0)
    return embedding, pieces, jnp.asarray(temperature, largest.dtype), largest


def _in_pieces(x: Array, chunk: int) -> Array:
    """Prototypes as "pieces chunk …"."""
    if chunk < 1 or len(x) % chunk:
        raise ValueError(f"chunk={chunk} does not divide {len(x)} prototypes")
    return x.reshape(len(x) // chunk, chunk, *x.shape[1:])


def _logits(embedding: Array, weight: Array) -> Array:
    """Logits in float32 at least."""
    return jnp.einsum("...d,kd->...k", embedding, weight, preferred_element_type=at_least_float32(embedding.dtype))


def _of_rows(scores: Array) -> tuple[Array, Array]:
    """For a piece "rows chunk": the logarithm of the sum of the exponentials, and the entropy of their shares."""
    log_sums = jax.nn.logsumexp(scores, axis=1)
    log_shares = scores - log_sums[:, None]
    return log_sums, -jnp.sum(jnp.exp(log_shares) * log_shares, axis=1)


def _over_pieces(log_sums: Array, entropies: Array) -> tuple[Array, Array]:
    """Logarithm of the divisor of each row, and the entropy, from `_of_rows` of all pieces."""
    total = jax.nn.logsumexp(log_sums, axis=0)
    log_shares = log_sums - total[None]
    return total, jnp.sum(jnp.exp(log_shares) * (entropies - log_shares), axis=0)
