"""Labelled images: a `Dataset` has two `Split`s, whose images are decoded one by one when they are needed."""

import dataclasses
import hashlib
import io
import os
import struct
from collections.abc import Callable, Iterable, Sequence
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
        name: "train", "validation" or "test".
        ids: name of each image for the user: a path inside the folder of the data set, or a number.
        labels: class index of each image.
        read: decodes image `i` to RGB; a damaged image raises a `UserError` that names it.
        fingerprint: hash that changes with the images and their order; part of the key of cached features.
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
    """Images to learn from and images to evaluate on; `notes` are sentences that the user should read."""

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
        UserError: the file is not a whole image; the message has its `name`.
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
        raise UserError(f"{name} is not a readable image ({error}); replace or remove it") from error


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


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder at any depth, sorted by path, without hidden ones."""
    return sorted(
        Path(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    )


def readable_images(paths: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Height and width of images, given as files or as folders that are searched at any depth.

    Files of a folder that are not readable images are left out, and named on stdout.

    Raises:
        UserError: a path that does not exist, a file that is not a readable image, or a folder without any.
    """
    sizes = {}
    for path in map(Path.expanduser, paths):
        if not path.exists():
            raise UserError(f"{path}: there is no such image or folder")
        files, errors = image_files(path) if path.is_dir() else [path], []
        if not files:
            raise UserError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
        for file in files:
            try:
                sizes[file] = decode_rgb(file, str(file)).shape[:2]
            except UserError as error:
                errors.append(error)
        if len(errors) == len(files):
            raise errors[0]
        for error in errors:
            print(f"left out: {error}")
    return sizes


def split_of_files(root: Path, name: str, files: dict[str, list[Path]], classes: Sequence[str]) -> Split:
    """Images by class as a split: labels are indices of `classes`, ids are paths inside `root`.

    Raises:
        UserError: a file that cannot be read.
    """
    paths = [path for found in files.values() for path in found]
    labels = np.repeat([classes.index(name) for name in files], [len(found) for found in files.values()])
    ids = [str(path.relative_to(root)) for path in paths]
    return Split(name, ids, labels, lambda i: decode_rgb(paths[i], str(paths[i])), digest(*map(file_stamp, ids, paths)))


def file_stamp(name: str, path: Path) -> str:
    """A file's name, size and time of change, which stand for its content: reading all files would take long.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); replace or remove it") from error
    return f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
