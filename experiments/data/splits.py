"""Labelled images: a `Dataset` has two `Split`s, whose images are decoded one by one when they are needed."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from dinojax.errors import UserError
from dinojax.images.decode import Pixels
from dinojax.probes import stratified_subset


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images in a fixed order.

    Attributes:
        name: "train", "validation" or "test".
        ids: name of each image for the user: a path inside the folder of the data set, or a number.
        labels: class index of each image.
        read: decodes image `i` to RGB; a damaged image raises a `UserError` that names it.
        fingerprint: hash that changes with the images and their order; part of the key of cached features.
        identity: the same without the times of files, so that copies of a folder have one identity; it tells a run
            whether its data are still the same. By default the fingerprint.
        files: path of each image, where every image is a file of its own.
    """

    name: str
    ids: Sequence[str]
    labels: Int[np.ndarray, " images"]
    read: Callable[[int], Pixels]
    fingerprint: str
    identity: str = ""
    files: Sequence[Path] = ()

    def __post_init__(self) -> None:
        if not self.identity:
            object.__setattr__(self, "identity", self.fingerprint)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Int[np.ndarray, " chosen"]) -> "Split":
        """The images at `indices`, in that order."""
        chosen = dataclasses.replace(
            self,
            ids=[self.ids[i] for i in indices],
            labels=self.labels[indices],
            files=[self.files[i] for i in indices] if self.files else (),
        )
        return chosen.changed(lambda i: self.read(int(indices[i])), np.asarray(indices, np.int64).tobytes())

    def changed(self, read: Callable[[int], Pixels], recipe: str | bytes) -> "Split":
        """The split with other pixels, which `read` makes as `recipe` says; both hashes follow."""
        hashes = (digest(self.fingerprint, recipe), digest(self.identity, recipe))
        return dataclasses.replace(self, read=read, fingerprint=hashes[0], identity=hashes[1])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images to learn from and images to evaluate on; `notes` are sentences that the user should read.

    `test.name` is "validation" where the validation images are evaluated for want of others.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    notes: tuple[str, ...] = ()


def digest(*parts: str | bytes) -> str:
    """SHA-256 of the parts, in order, as hexadecimal digits."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(part.encode() if isinstance(part, str) else part)
    return sha256.hexdigest()


def limit_images(split: Split, count: int | None, flag: str, seed: int) -> Split:
    """At most `count` images, drawn from every class in proportion to its size.

    Args:
        split: of any size.
        count: None keeps all images.
        flag: the user's name of `count`.
        seed: of the draw.

    Raises:
        UserError: fewer than one image per class.
    """
    if count is None or count >= len(split):
        return split
    classes = len(np.unique(split.labels))
    if count < classes:
        raise UserError(f"{flag} {count} is fewer than one image for each of the {classes} classes; raise it")
    return split.subset(stratified_subset(split.labels, count, seed))
