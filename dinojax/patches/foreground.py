"""The probability that a patch is foreground, by a linear probe that a few masks teach.

Without masks, `dinojax.maps.foreground_scores` takes the first principal component.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from dinojax.errors import UserError
from dinojax.probes.linear import LinearHead, linear_logits
from dinojax.probes.logistic import fit_logistic


def patch_shares(mask: Bool[np.ndarray, "height width"], patch_size: int) -> Float[np.ndarray, "rows columns"]:
    """The share of each patch that a mask of whole patches covers.

    Raises:
        ValueError: the mask does not consist of whole patches.
    """
    height, width = mask.shape
    return mask.reshape(height // patch_size, patch_size, width // patch_size, patch_size).mean(axis=(1, 3))


def fit_foreground(
    features: Sequence[Float[Array | np.ndarray, "_rows _columns dim"]],
    inside: Sequence[Bool[np.ndarray, "_rows _columns"]],
    *,
    C: float = 1.0,  # noqa: N803
) -> LinearHead:
    """A logistic regression that tells foreground patches from others.

    Args:
        features: patch features of each image; the images may differ in size.
        inside: which patches of each image are foreground.
        C: inverse strength of the penalty, as in scikit-learn's `LogisticRegression`.

    Raises:
        UserError: no images, or patches that are all foreground or all background.
    """
    if not len(features) or len(features) != len(inside):
        raise UserError(f"{len(features)} images and {len(inside)} masks were given; give one mask for each image")
    labels = np.concatenate([one.ravel() for one in inside])
    if labels.all() or not labels.any():
        what = "foreground" if labels.all() else "background"
        raise UserError(f"all {len(labels):,} patches of the masks are {what}; give masks that hold both")
    patches = np.concatenate([np.asarray(one, np.float32).reshape(-1, one.shape[-1]) for one in features])
    return fit_logistic(patches, labels.astype(np.int32), num_classes=2, C=C)


def foreground_probability(
    head: LinearHead, features: Float[Array | np.ndarray, "rows columns dim"]
) -> Float[np.ndarray, "rows columns"]:
    """The probability of each patch of an image to be foreground."""
    logits = linear_logits(head, np.asarray(features, np.float32).reshape(-1, features.shape[-1]))
    return np.asarray(jax.nn.softmax(logits)[:, 1]).reshape(features.shape[:2])
