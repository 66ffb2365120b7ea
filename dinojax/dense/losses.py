"""Losses of a dense head: cross-entropy of every pixel, and the scale-invariant loss of depth.

The cross-entropy is computed strip by strip together with its gradient, so that no array holds the scores of all
pixels and classes: 16 masks of 448 × 448 px with 150 classes would take 1.9 GB.

Source: PyTorch `F.cross_entropy(F.interpolate(scores, size), masks, ignore_index=255)`; facebookresearch/dinov2
b8931f7 `dinov2/eval/depth/models/losses/sigloss.py` and `decode_heads/decode_head.py` (bins).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from dinojax.dense.resize import bilinear_matrix, resize_bilinear

VOID = 255  # label of pixels that do not count
_STRIP = 2**17  # scores that are computed at once on a CPU
_ON_ACCELERATORS = 2**24
_LEAST = 1e-3  # metres, added before the logarithm
_MEAN_WEIGHT = 0.15
_BIN_FLOOR = 0.1


def segmentation_loss(
    scores: Float[Array, "batch rows columns classes"], masks: UInt8[Array, "batch height width"]
) -> Float[Array, ""]:
    """Mean softmax cross-entropy in nats over all pixels that are not `VOID`; 0 where there are none.

    Args:
        scores: of patches; they are interpolated to the size of the masks.
        masks: class index of each pixel, or `VOID`.
    """
    return _cross_entropy(scores, masks)


@jax.custom_vjp
def _cross_entropy(scores: Array, masks: Array) -> Array:
    return _with_gradient(scores, masks)[0]


def _with_gradient(scores: Array, masks: Array) -> tuple[Array, Array]:
    """The loss, and its gradient with respect to the scores."""
    count = jnp.maximum((masks != VOID).sum(), 1).astype(scores.dtype)
    if jax.default_backend() == "cpu":
        sums, gradients = jax.lax.map(lambda one: _image(*one, budget=_STRIP), (scores, masks))
    else:
        sums, gradients = jax.vmap(partial(_image, budget=_ON_ACCELERATORS // len(scores)))(scores, masks)
    return sums.sum() / count, gradients / count


def _image(scores: Array, mask: Array, *, budget: int) -> tuple[Array, Array]:
    """Summed cross-entropy of one image, and its gradient, strip by strip.

    Classes come first, so that what is computed for all pixels is computed for neighbours in memory.
    """
    (rows, columns, classes), (height, width), dtype = scores.shape, mask.shape, scores.dtype
    lines = min(height, max(1, budget // (width * classes)))
    strips = -(-height // lines)
    missing = strips * lines - height
    down = jnp.asarray(bilinear_matrix(height, rows), dtype)
    down = jnp.pad(down, ((0, missing), (0, 0))).reshape(strips, lines, rows)
    labels = jnp.pad(mask, ((0, missing), (0, 0)), constant_values=VOID).reshape(strips, lines, width)
    across = jnp.asarray(bilinear_matrix(width, columns), dtype)
    wide = jnp.einsum("rck,wc->krw", scores, across, precision="highest")
    names = jnp.arange(classes, dtype=mask.dtype)[:, None, None]

    def strip(carry: tuple[Array, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        total, gradient = carry
        weights, labels = inputs
        pixels = jnp.einsum("hr,krw->khw", weights, wide, precision="highest")
        valid = (labels != VOID).astype(dtype)
        is_label = (labels[None] == names).astype(dtype)
        shifted = pixels - pixels.max(axis=0, keepdims=True)
        exponential = jnp.exp(shifted)
        norm = exponential.sum(axis=0)
        loss = ((jnp.log(norm) - (shifted * is_label).sum(axis=0)) * valid).sum()
        slope = exponential * (valid / norm)[None] - is_label * valid[None]
        return (total + loss, gradient + jnp.einsum("hr,khw->krw", weights, slope, precision="highest")), None

    start = jnp.zeros((), dtype), jnp.zeros_like(wide)
    (total, gradient), _ = jax.lax.scan(strip, start, (down, labels))
    return total, jnp.einsum("krw,wc->rck", gradient, across, precision="highest")


def _forward(scores: Array, masks: Array) -> tuple[Array, Array]:
    return _with_gradient(scores, masks)


def _backward(gradient: Array, cotangent: Array) -> tuple[Array, None]:
    return gradient * cotangent, None


_cross_entropy.defvjp(_forward, _backward)


def bin_depth(scores: Float[Array, "*batch bins"], least: float, most: float) -> Float[Array, "*batch"]:
    """Depth as a mean of bins, evenly spaced from `least` to `most` metres, that the scores weight.

    The weights are relu(score) + 0.1, divided by their sum.
    """
    weights = jax.nn.relu(scores) + _BIN_FLOOR
    centres = jnp.linspace(least, most, scores.shape[-1], dtype=scores.dtype)
    return jnp.matmul(weights, centres, precision="highest") / weights.sum(axis=-1)


def depth_loss(
    depth: Float[Array, "batch rows columns"], truth: Float[Array, "batch height width"]
) -> Float[Array, ""]:
    """The scale-invariant logarithmic loss √(variance + 0.15 · mean²) of log(depth) − log(truth).

    Pixels whose truth is 0 were not measured and do not count. Where fewer than two count, the loss is 0.

    Args:
        depth: of patches, in metres and positive; it is interpolated to the size of the truth.
        truth: metres.
    """
    pixels = resize_bilinear(depth[..., None], *truth.shape[1:])[..., 0]
    valid = truth > 0
    count = valid.sum()
    gap = jnp.where(valid, jnp.log(pixels + _LEAST) - jnp.log(jnp.where(valid, truth, 1) + _LEAST), 0)
    mean = gap.sum() / jnp.maximum(count, 1)
    variance = jnp.where(valid, jnp.square(gap - mean), 0).sum() / jnp.maximum(count - 1, 1)
    square = variance + _MEAN_WEIGHT * jnp.square(mean)
    counted = (count > 1) & (square > 0)  # the root has no slope at 0
    return jnp.where(counted, jnp.sqrt(jnp.where(counted, square, 1)), 0)
