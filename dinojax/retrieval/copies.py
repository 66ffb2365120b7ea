"""Features for copy detection: the class token beside pooled patch tokens, whitened on other images.

    features = unit_length(copy_features(cls_tokens, patch_tokens))
    whitening = fit_whitening(unit_length(copy_features(other_cls_tokens, other_patch_tokens)))
    similarity, images = nearest(whiten(features, whitening), whiten(queries, whitening), k=10)

Source: facebookresearch/dino 7c446df `eval_copy_detection.py`, and `PCA` in its `utils.py`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from dinojax.errors import UserError, require
from dinojax.probes.labelled import check_finite

_LEAST = 1e-6  # what lower values are raised to before GeM, which takes powers
_FLOOR = 1e-5  # least variance of a direction, as a share of the largest


def gem(patch_tokens: Float[Array | np.ndarray, "images patches dim"], *, p: float = 4.0) -> Float[Array, "images dim"]:
    """The generalised mean of the patch tokens, in each dimension: (mean over patches of max(x, 1e-6)ᵖ)^(1/p).

    p = 1 is the mean of the positive parts, and a large p approaches the maximum. May be jitted.
    """
    return jnp.mean(jnp.maximum(patch_tokens, _LEAST) ** p, axis=1) ** (1 / p)


def copy_features(
    cls_tokens: Float[Array | np.ndarray, "images dim"],
    patch_tokens: Float[Array | np.ndarray, "images patches dim"],
    *,
    p: float = 4.0,
) -> Float[Array, "images two_dims"]:
    """The class token, followed by the generalised mean of the patch tokens; both after the final norm. May be jitted.

    Returns:
        Features of twice the width.
    """
    return jnp.concatenate([jnp.asarray(cls_tokens), gem(patch_tokens, p=p)], axis=1)


class Whitening(NamedTuple):
    """A linear map after which the images that it was fitted on have variance 1 and correlation 0.

    Attributes:
        mean: which is subtracted first.
        projection: onto the principal directions, largest variance first, each divided by its deviation.
    """

    mean: Float64[np.ndarray, " dim"]
    projection: Float64[np.ndarray, "kept dim"]


def fit_whitening(
    features: Float[Array | np.ndarray, "images dim"], *, dim: int | None = None, centred: bool = True
) -> Whitening:
    """PCA whitening, learned on images other than those that are searched.

    With the covariance C = mean of (x − mean)(x − mean)ᵀ, its eigenvalues λ and eigenvectors v as rows, the projection
    is v / √λ. Eigenvalues below 1e-5 of the largest are raised to it.

    Args:
        features: of other images.
        dim: number of directions to keep. None keeps all.
        centred: False leaves the mean in the features of which C is the mean product, as upstream does; the first
            direction is then nearly that of the mean.

    Raises:
        UserError: fewer than two images, images that are all the same, a `dim` out of range, or a feature that is not
            finite.
    """
    width = features.shape[1]
    kept = width if dim is None else dim
    require(1 <= kept <= width, "dim", dim, f"between 1 and the {width} dimensions of the features")
    check_finite(features)
    array = np.asarray(features, np.float64)
    if len(array) < 2 or (array == array[:1]).all():
        raise UserError(f"a whitening of {len(array)} images that do not differ cannot be learned; give other images")
    mean = array.mean(axis=0)
    around = array - mean[None] if centred else array
    variances, directions = np.linalg.eigh(around.T @ around / len(array))
    variances = np.maximum(variances, _FLOOR * variances[-1])[::-1][:kept]
    return Whitening(mean, directions.T[::-1][:kept] / np.sqrt(variances)[:, None])


def whiten(features: Float[Array | np.ndarray, "images dim"], whitening: Whitening) -> Float[np.ndarray, "images kept"]:
    """The features through the whitening, in float32; `nearest` then compares their directions."""
    centred = np.asarray(features, np.float64) - whitening.mean[None]
    return (centred @ whitening.projection.T).astype(np.float32)
