"""The linear head on patch features: batch normalisation, then one linear layer for all patches (a 1×1 convolution).

A trained head is folded into one kernel and bias, which take raw features.

Source: facebookresearch/dinov2 b8931f7 `dinov2/eval/segmentation/models/decode_heads/linear_head.py` (`BNHead`);
PyTorch `nn.BatchNorm2d` for its constants.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from dinojax.precision import at_least_float32

EPSILON = 1e-5
MOMENTUM = 0.1  # share of a batch in the running statistics
_INITIAL_DEVIATION = 0.01  # of the kernel, as mmsegmentation's `BaseDecodeHead` has it


class HeadParameters(NamedTuple):
    """What is trained: scale and shift of the normalisation, kernel and bias of the linear layer."""

    scale: Float[Array, " width"]
    shift: Float[Array, " width"]
    kernel: Float[Array, "width outputs"]
    bias: Float[Array, " outputs"]


class Statistics(NamedTuple):
    """Running mean and variance of the features."""

    mean: Float[Array, " width"]
    variance: Float[Array, " width"]


class DenseHead(NamedTuple):
    """A head on raw features: scores = patches @ kernel + bias."""

    kernel: Float[Array | np.ndarray, "width outputs"]
    bias: Float[Array | np.ndarray, " outputs"]


def initial_head(key: Key[Array, ""], width: int, outputs: int) -> tuple[HeadParameters, Statistics]:
    """A head before its first step."""
    kernel = _INITIAL_DEVIATION * jax.random.normal(key, (width, outputs))
    ones, zeros = jnp.ones(width, kernel.dtype), jnp.zeros(width, kernel.dtype)
    return HeadParameters(ones, zeros, kernel, jnp.zeros(outputs, kernel.dtype)), Statistics(zeros, ones)


def fold(parameters: HeadParameters, statistics: Statistics) -> DenseHead:
    """The normalisation and the linear layer as one linear layer."""
    slope = parameters.scale / jnp.sqrt(statistics.variance + EPSILON)
    moved = parameters.shift - statistics.mean * slope
    bias = parameters.bias + jnp.matmul(moved, parameters.kernel, precision="highest")
    return DenseHead(parameters.kernel * slope[:, None], bias)


def dense_scores(head: DenseHead, patches: Float[Array | np.ndarray, "*batch width"]) -> Float[Array, "*batch outputs"]:
    """The scores of patches, in float32 at least."""
    patches = jnp.asarray(patches)
    patches = patches.astype(at_least_float32(patches.dtype))
    bias = jnp.asarray(head.bias).reshape((1,) * (patches.ndim - 1) + (-1,))
    return jnp.matmul(patches, head.kernel, precision="highest") + bias


def train_scores(
    parameters: HeadParameters,
    statistics: Statistics,
    patches: Float[Array, "batch rows columns width"],
) -> tuple[Float[Array, "batch rows columns outputs"], Statistics]:
    """The scores of a training batch, normalised by its own mean and variance, and the new running statistics.

    Of fewer than two patches there is no variance; the running statistics then stay as they are.
    """
    patches = patches.astype(at_least_float32(patches.dtype))
    count = patches.size // patches.shape[-1]
    mean = patches.mean(axis=(0, 1, 2))
    variance = jnp.square(patches - mean[None, None, None]).mean(axis=(0, 1, 2))
    scores = dense_scores(fold(parameters, Statistics(mean, variance)), patches)
    if count < 2:
        return scores, statistics
    unbiased = variance * (count / (count - 1))
    running = jax.tree.map(
        lambda old, new: (1 - MOMENTUM) * old + MOMENTUM * new, statistics, Statistics(mean, unbiased)
    )
    return scores, running
