"""Labelled features: dividing a set, and refusing one that no classifier can learn from."""

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from dinojax.errors import UserError, require

Labels = Int[Array | np.ndarray, " images"]
_ROWS = 65_536


def stratified_subset(labels: Labels, count: int, seed: int) -> Int[np.ndarray, " count"]:
    """Ascending indices of `count` images drawn from each class in proportion to its size.

    Each class gives at least one image, and a common class at most one more than its share.

    Raises:
        ValueError: `count` is less than the number of classes, or more than the number of images.
    """
    labels = np.asarray(labels)
    classes, sizes = np.unique(labels, return_counts=True)
    if not len(classes) <= count <= len(labels):
        raise ValueError(f"count={count} is not between {len(classes)} (classes) and {len(labels)} (images)")
    by_class, rank_in_class = _shuffled_by_class(labels, seed)
    share = rank_in_class / np.repeat(sizes, sizes)
    return np.sort(by_class[np.argsort(share, kind="stable")[:count]])


def split_heldout(
    labels: Labels, fraction: float, seed: int
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " heldout"]]:
    """Indices of images to train on, and of images held out for selection.

    The split is stratified, and at least one image of each class stays in training.

    Raises:
        UserError: no image can be held out, because each class has only one.
    """
    labels = np.asarray(labels)
    most = len(labels) - len(np.unique(labels))
    if most < 1:
        raise UserError(f"{len(labels)} images, one per class, leave none to hold out; give more images per class")
    heldout = min(max(1, round(fraction * len(labels))), most)
    kept = stratified_subset(labels, len(labels) - heldout, seed)
    return kept, np.setdiff1d(np.arange(len(labels)), kept)


def few_shot_indices(labels: Labels, shots: int, seed: int) -> Int[np.ndarray, " chosen"]:
    """Ascending indices of `shots` images drawn from each class that occurs.

    Raises:
        UserError: `shots` is not positive, or is more than the number of images in the smallest class.
    """
    labels = np.asarray(labels)
    classes, sizes = np.unique(labels, return_counts=True)
    require(shots >= 1, "shots", shots, "a positive number of images per class")
    if len(sizes) and shots > sizes.min():
        smallest = int(sizes.argmin())
        raise UserError(
            f"shots={shots} is more than the {sizes[smallest]} images of class {classes[smallest]}; take fewer shots"
        )
    by_class, rank_in_class = _shuffled_by_class(labels, seed)
    return np.sort(by_class[rank_in_class < shots])


def check_labelled(features: Float[Array | np.ndarray, "images *shape"], labels: Labels, num_classes: int) -> None:
    """Refuses a training set with a single class, a label out of range, or features that are not finite.

    Raises:
        UserError: names the value.
    """
    check_classes(labels, num_classes)
    check_finite(features)


def check_classes(labels: Labels, num_classes: int) -> None:
    """Refuses the labels of a training set if there is a single class, or a label out of range.

    Raises:
        UserError: names the value.
    """
    labels = np.asarray(labels)
    check_range(labels, num_classes)
    if (labels == labels[0]).all():
        raise UserError(
            f"all {len(labels)} training images are of class {labels[0]}; a classifier needs two classes or more"
        )


def check_range(labels: Labels, num_classes: int) -> None:
    """Refuses an empty set and labels outside 0 … `num_classes` − 1.

    Raises:
        UserError: names the value.
    """
    labels = np.asarray(labels)
    if not len(labels):
        raise UserError("there are 0 images to learn from or to select on; give more images")
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        raise UserError(
            f"label {labels[outside[0]]} of image {outside[0]} is not between 0 and {num_classes - 1} "
            f"(num_classes={num_classes})"
        )


def check_finite(features: Float[Array | np.ndarray, "images *shape"]) -> None:
    """Refuses NaN and infinity; large sets are checked in chunks.

    Raises:
        UserError: names the first image whose features are not finite.
    """
    for start in range(0, len(features), _ROWS):
        chunk = np.asarray(jax.device_get(features[start : start + _ROWS]))
        if not np.isfinite(chunk).all():
            row, *place = np.argwhere(~np.isfinite(chunk))[0]
            value = chunk[(row, *place)]
            raise UserError(
                f"the features of image {start + row} are not finite ({value}); compute them again, in float32"
            )


def _shuffled_by_class(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices sorted by class and shuffled within each class, and the rank of each index in its class."""
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(inverse[shuffled], kind="stable")]
    return by_class, np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
