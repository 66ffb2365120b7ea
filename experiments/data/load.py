"""Labelled images by name or path, for every command that probes or pretrains."""

import dataclasses
from pathlib import Path

from dinojax.errors import UserError
from experiments.data import tiny_imagenet
from experiments.data.digits import load_digits
from experiments.data.folder import load_folder
from experiments.data.splits import Dataset, limit_images
from experiments.data.tfds import import_tfds, load_tfds


def load_dataset(
    data: str,
    *,
    data_dir: Path | None = None,
    val_fraction: float | None = None,
    dividable: bool = False,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
) -> Dataset:
    """The data set that `data` names.

    Args:
        data: "digits", a folder, "tiny_imagenet", or a TensorFlow Datasets name such as "cifar10".
        data_dir: folder of prepared TensorFlow Datasets (None takes its own default) and of tiny-imagenet-200 (None
            takes the working folder).
        val_fraction: share of the images of each class that become the evaluated images, in a folder without others.
        dividable: whether the command has --val-fraction, for its messages.
        max_train: number of training images to draw, from every class in proportion to its size. None takes all.
        max_test: number of test images to draw, in the same way.
        seed: of the draws.

    Raises:
        UserError: the data set is not found, damaged, or has too few classes or images.
    """
    root = Path(data).expanduser()
    if data == "digits":
        dataset = load_digits()
    elif data == tiny_imagenet.NAME:
        dataset = _load_tiny_imagenet(data_dir)
    elif tiny_imagenet.is_tiny_imagenet(root):
        dataset = tiny_imagenet.load_tiny_imagenet(root)
    elif root.is_dir():
        options = {"val_fraction": val_fraction, "dividable": dividable, "seed": seed}
        return load_folder(root, max_train=max_train, max_test=max_test, **options)
    elif root.name != data or data.startswith((".", "~")):
        raise UserError(f"--data {data}: there is no such folder")
    else:
        dataset = load_tfds(data, data_dir)
    if val_fraction is not None:
        held = f"{data} has {dataset.test.name} images already"
        raise UserError(f"--val-fraction {val_fraction}: {held}; leave the flag out")
    _check_classes(dataset)
    train = limit_images(dataset.train, max_train, "--max-train", seed)
    return dataclasses.replace(dataset, train=train, test=limit_images(dataset.test, max_test, "--max-test", seed))


def _load_tiny_imagenet(data_dir: Path | None) -> Dataset:
    """From the extracted folder in `data_dir` or the working folder; else from TFDS, prepared if necessary."""
    folder = (data_dir or Path()).expanduser() / tiny_imagenet.FOLDER
    if tiny_imagenet.is_tiny_imagenet(folder):
        return tiny_imagenet.load_tiny_imagenet(folder)
    import_tfds(tiny_imagenet.NAME, f"extract {tiny_imagenet.ARCHIVE.url} and pass its folder as --data")
    from experiments.data.tiny_imagenet_builder import load_prepared

    return load_prepared(data_dir)


def _check_classes(dataset: Dataset) -> None:
    if len(dataset.class_names) < 2:
        raise UserError(f"--data {dataset.name}: one class, {dataset.class_names[0]!r}, leaves nothing to tell apart")
    for split in (dataset.train, dataset.test):
        if len(split) == 0:
            raise UserError(f"--data {dataset.name}: its {split.name} split holds no images")
        if split.labels.min() < 0:
            raise UserError(f"--data {dataset.name}: its {split.name} split holds images without a label")
