"""Labelled images by name: scikit-learn's digits, a folder of class folders, Tiny-ImageNet, TensorFlow Datasets.

Each becomes a `Dataset` of two `Split`s whose images are decoded one by one, when they are asked for.
"""

import dataclasses
import hashlib
import io
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps

from dinojax.errors import UserError
from dinojax.probes import stratified_subset

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

Pixels = UInt8[np.ndarray, "height width 3"]


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled images in a fixed order.

    Attributes:
        name: "train" or "test".
        ids: what names each image to the user: a path inside the data set's folder, or a number.
        labels: the class index of each image.
        read: decodes image `i` to RGB; raises `UserError` with its name where it is damaged.
        fingerprint: differs where the images or their order differ; the key of whatever is computed from them.
    """

    name: str
    ids: Sequence[str]
    labels: Int[np.ndarray, " images"]
    read: Callable[[int], Pixels]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Int[np.ndarray, " chosen"]) -> "Split":
        """The images at `indices`, in that order."""
        return Split(
            self.name,
            [self.ids[i] for i in indices],
            self.labels[indices],
            lambda i: self.read(int(indices[i])),
            digest(self.fingerprint, np.asarray(indices, np.int64).tobytes()),
        )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images to learn from and images to be judged on; `notes` are sentences the user should read."""

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


def decode_rgb(file: Path | io.BytesIO, name: str) -> Pixels:
    """Reads an image of any mode as RGB, turned upright by its EXIF tag.

    Greyscale, palette and CMYK images are converted, alpha is dropped (as `PIL.Image.convert("RGB")`, which upstream
    uses), 16-bit images are scaled to 8 bits.

    Raises:
        UserError: what is in the file is no whole image; `name` is in the message.
    """
    try:
        with Image.open(file) as image:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode == "P":  # straight to RGB, Pillow warns about transparency
                image = image.convert("RGBA")
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is no readable image ({error}); replace or remove it") from error


def limit_images(split: Split, count: int | None, flag: str, seed: int) -> Split:
    """At most `count` images, drawn from every class in proportion; `flag` is what the user set.

    Raises:
        UserError: less than one image a class.
    """
    if count is None or count >= len(split):
        return split
    classes = len(np.unique(split.labels))
    if count < classes:
        raise UserError(f"{flag} {count} is less than one image for each of the {classes} classes; raise it")
    return split.subset(stratified_subset(split.labels, count, seed))


def image_files(folder: Path) -> list[Path]:
    """The images in a folder and below, in the order of their paths; nothing hidden."""
    return sorted(
        Path(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    )


def split_of_files(root: Path, name: str, files: dict[str, list[Path]], classes: Sequence[str]) -> Split:
    """Images by class as a split; the labels count through `classes`, the ids are paths inside `root`."""
    paths = [path for found in files.values() for path in found]
    labels = np.repeat([classes.index(name) for name in files], [len(found) for found in files.values()])
    ids = [str(path.relative_to(root)) for path in paths]
    # Size and time of change stand for the content: reading it all would take as long as decoding it.
    stamps = (f"{i}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for i, stat in zip(ids, (path.stat() for path in paths)))
    return Split(name, ids, labels, lambda i: decode_rgb(paths[i], str(paths[i])), digest(*stamps))
