"""Monitors of self-distillation: spread and rank of the features, norms of the gradients, a diagnosis of collapse."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dinojax.parallel import norm
from dinojax.precision import at_least_float32

# Signs of a teacher that answers the same for every image: a loss within this share of log K, or this spread or less.
_LOSS_MARGIN = 0.01
_LEAST_SPREAD = 0.05


def feature_std(features: Float[Array, "batch dim"]) -> Float[Array, ""]:
    """Standard deviation over the batch of features of length one, times √dim: near 1 healthy, near 0 collapsed."""
    features = features.astype(at_least_float32(features.dtype))
    unit = features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    return jnp.sqrt(features.shape[-1]) * jnp.mean(jnp.std(unit, axis=0))


def rank_me(features: Float[Array, "images dim"]) -> Float[Array, ""]:
    """The effective rank of features, from 1 to dim: the exponential of the entropy of their singular values.

    Source: RankMe (arXiv 2210.02885), Eq. 1 and 2, with its ε = 1e-7.
    """
    values = jnp.linalg.svd(features.astype(at_least_float32(features.dtype)), compute_uv=False)
    share = values / jnp.sum(values) + 1e-7
    return jnp.exp(-jnp.sum(share * jnp.log(share)))


def gradient_norms(gradients: Any, clip_norm: float | None) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The norm of all gradients together, and the share of tensors with a norm above `clip_norm`.

    The share is 0 if `clip_norm` is None or 0.
    """
    norms = jnp.stack([norm(gradient) for gradient in jax.tree.leaves(gradients)])
    clipped = norms > clip_norm if clip_norm else jnp.zeros(norms.shape, bool)
    return jnp.linalg.norm(norms), jnp.mean(clipped, dtype=norms.dtype)


def diagnose_collapse(loss: float, feature_std: float, prototypes: int) -> str | None:
    """A sentence that describes a collapse and what to do about it, or None without signs of one.

    Use it after the warm-up, on means over some steps: at the start every loss is near log K.

    Args:
        loss: mean loss in nats.
        feature_std: mean of `feature_std`.
        prototypes: K, the number of prototypes.

    Source: the authors' advice in the README of facebookresearch/dino and in its issues about small data sets.
    """
    uniform = math.log(prototypes)
    if abs(loss - uniform) <= _LOSS_MARGIN * uniform:
        sign = f"the loss {loss:.3f} stays at log({prototypes}) = {uniform:.3f}: the teacher's answer is uniform"
    elif feature_std < _LEAST_SPREAD:
        sign = f"the features of all images point the same way (spread {feature_std:.3f}, healthy is near 1)"
    else:
        return None
    return (
        f"collapse: {sign}; lower the teacher temperature (0.04 without warm-up), raise the teacher momentum "
        "(0.9995 at batch 256), or lower the learning rate"
    )


def diagnose_dinov2_collapse(metrics: Mapping[str, float], prototypes: int, patch_prototypes: int) -> str | None:
    """`diagnose_collapse` for DINOv2: of the class tokens, then of the masked patches.

    Args:
        metrics: means over some steps of those of `make_dinov2_train_step`.
        prototypes: number of prototypes for class tokens.
        patch_prototypes: number of prototypes for patch tokens.
    """
    spread = metrics["feature_std"]
    found = diagnose_collapse(metrics["class_cross_entropy"], spread, prototypes)
    if found is None and metrics["masked_share"] > 0:
        found = diagnose_collapse(metrics["patch_cross_entropy"], spread, patch_prototypes)
        return found and f"masked patches: {found}"
    return found
