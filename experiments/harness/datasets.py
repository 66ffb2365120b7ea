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
from dinojax.probe import stratified_subset

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "validation")}

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


def load_dataset(
    data: str,
    *,
    data_dir: Path | None = None,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
) -> Dataset:
    """The data set that `data` names: "digits", a folder, "tiny_imagenet", or a TensorFlow Datasets name ("cifar10").

    Args:
        data: see above.
        data_dir: where TensorFlow Datasets keeps its files (None is its own default) and Tiny-ImageNet was extracted
            (None is the working folder).
        max_train: draw this many training images, from every class in proportion to its size.
        max_test: likewise.
        seed: of that draw.

    Raises:
        UserError: everything that keeps the images from being read, within seconds.
    """
    if data == "digits":
        dataset = load_digits()
    elif Path(data).expanduser().is_dir() or data == "tiny_imagenet":
        dataset = _load_path(data, data_dir)
    elif Path(data).name != data or data.startswith((".", "~")):
        raise UserError(f"--data {data}: there is no such folder")
    else:
        from experiments.harness.tfds_source import load_tfds

        dataset = load_tfds(data, data_dir)
    _check_classes(dataset)
    train = limit_images(dataset.train, max_train, "--max-train", seed)
    return dataclasses.replace(dataset, train=train, test=limit_images(dataset.test, max_test, "--max-test", seed))


def _load_path(data: str, data_dir: Path | None) -> Dataset:
    from experiments.harness import tiny_imagenet

    if data == tiny_imagenet.NAME:
        return tiny_imagenet.load_by_name(data_dir)
    root = Path(data).expanduser()
    return tiny_imagenet.load_tiny_imagenet(root) if tiny_imagenet.is_tiny_imagenet(root) else load_folder(root)


def load_digits() -> Dataset:
    """The 1,797 scans of handwritten digits inside scikit-learn, 8×8 px; a fixed stratified fifth is for testing."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None].repeat(3, axis=3)
    everything = Split(
        "", [str(i) for i in range(len(images))], digits.target, images.__getitem__, digest(images.tobytes())
    )
    kept = stratified_subset(digits.target, round(0.8 * len(images)), seed=0)
    rest = np.setdiff1d(np.arange(len(images)), kept)
    train, test = (
        dataclasses.replace(everything.subset(part), name=name) for name, part in (("train", kept), ("test", rest))
    )
    return Dataset("digits", tuple(map(str, digits.target_names)), train, test)


def load_folder(root: Path) -> Dataset:
    """A folder with `train/<class>/…` and `test/<class>/…` (also `training`, `val`, `validation`), nested at will.

    Raises:
        UserError: a split without a folder, classes or images, or a class that is only in the test set.
    """
    files = {split: _class_files(root, split) for split in FOLDERS}
    classes = tuple(sorted(files["train"]))
    unknown = sorted(set(files["test"]) - set(classes))
    if unknown:
        raise UserError(f"{root}: class {unknown[0]!r} is among the test folders but not among the training folders")
    absent = sorted(set(classes) - set(files["test"]))
    notes = (f"{root.name}: no test images of {', '.join(map(repr, absent))}",) if absent else ()
    train, test = (split_of_files(root, split, files[split], classes) for split in FOLDERS)
    return Dataset(root.resolve().name, classes, train, test, notes)


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


def _check_classes(dataset: Dataset) -> None:
    if len(dataset.class_names) < 2:
        raise UserError(f"--data {dataset.name}: one class, {dataset.class_names[0]!r}, leaves nothing to tell apart")
    for split in (dataset.train, dataset.test):
        if len(split) == 0:
            raise UserError(f"--data {dataset.name}: its {split.name} split holds no images")
        if split.labels.min() < 0:
            raise UserError(f"--data {dataset.name}: its {split.name} split holds images without a label")


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


def _class_files(root: Path, split: str) -> dict[str, list[Path]]:
    """Image files by class, both in order of their names."""
    names = FOLDERS[split]
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"{root} has no folder {' or '.join(names)}: images belong in {names[0]}/<class>/")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    if not classes:
        raise UserError(f"{folder} holds no class folders: images belong in {names[0]}/<class>/")
    files = {path.name: image_files(path) for path in classes}
    empty = [name for name, found in files.items() if not found]
    if len(empty) == len(files):
        raise UserError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    if empty:
        raise UserError(f"{folder / empty[0]} holds no images: add some, or remove the empty class")
    return files


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
