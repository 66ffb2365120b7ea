"""Evaluates how features transfer to STL-10, 96 px photographs of ten classes, by the probes of `experiments.evaluate`.

    python -m experiments.stl10_transfer runs/dino_cifar100/small-seed0 --image-size 96
    python -m experiments.stl10_transfer dinov2_vits14 --data path/to/stl10_binary
    python -m experiments.stl10_transfer dino_vits16 --data stl10 --folds path/to/fold_indices.txt

Images are resized to 256 px (bicubic), then the centre of 224 px is cropped; with another --image-size, both change in
proportion. The time grows with the square of the size, so models with small patches (4 or 8 px) need a smaller one.
With --folds, every probe but few_shot is fitted to each of the official folds alone, and the table shows mean and
standard deviation.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np

from dinojax.commands import exit_on_user_error
from dinojax.documents import sha256_of_file
from dinojax.errors import UserError
from experiments.data.splits import Dataset, Split, digest
from experiments.probing.config import EvaluationConfig, LabelledData
from experiments.probing.data import load_data, make_fold
from experiments.probing.result import EvaluationResult, run_evaluation
from experiments.runs.command_line import command_line
from experiments.runs.settings import POSITIVE, Flags, GivenBackbone, replace

NAME = "stl10"
_SIDE = 96
_OFFICIAL = "https://cs.stanford.edu/~acoates/stl10/"


@dataclasses.dataclass(frozen=True)
class Stl10Settings(LabelledData):
    """STL-10, and how many of its images to use."""

    data: str = NAME
    """Name or folder of the images: stl10 (TensorFlow Datasets); the extracted official folder stl10_binary, which
    holds train_X.bin and so on; or a folder with train/<class>/… and test/<class>/…, or with <class>/… alone and
    --val-fraction."""
    folds: Path | None = None
    """File of the official fold_indices.txt: ten lines of the numbers of 1,000 training images, in the order of the
    official files. Images in a folder must be named by these numbers (train/<class>/0123.png)."""


@dataclasses.dataclass(frozen=True)
class LargeImages(GivenBackbone):
    """The backbone, and how it computes features."""

    image_size: Annotated[int | None, POSITIVE] = 224
    """Side in pixels of the square image that the model sees. Unless --resize is given, the shorter side is resized to
    8/7 of it before the centre is cropped. None takes the size the model was trained at."""


@dataclasses.dataclass(frozen=True)
class Config(EvaluationConfig):
    """A transfer to STL-10; see the top of this file."""

    model: Flags[LargeImages]
    dataset: Flags[Stl10Settings] = Stl10Settings()


def run(config: Config) -> EvaluationResult:
    """Evaluates, and writes the output folder.

    Raises:
        UserError: STL-10 is not there, or weights, folds or settings cannot be used.
    """
    config.check()
    data, image_size = config.dataset, config.model.image_size
    if data.folds is not None and data.max_train is not None:
        raise UserError(f"--max-train {data.max_train} leaves out images of the folds; drop it or --folds")
    dataset = load_stl10(config)
    folds = None
    if data.folds is not None:
        labels, places = dataset.train.labels, official_places(data.data, dataset.train)
        folds = [make_fold(labels, config, places[fold]) for fold in read_folds(data.folds, len(labels))]
    if config.networks.resize is None and image_size is not None:
        config = replace(config, resize=round(image_size * 256 / 224))
    return run_evaluation(config, dataset, command="stl10_transfer", folds=folds)


def load_stl10(config: Config) -> Dataset:
    """The images, from wherever `--data` says.

    Raises:
        UserError: they are not there, or cannot be read.
    """
    data = config.dataset
    folder = Path(data.data).expanduser()
    if data.data == NAME:
        try:
            return load_data(config)
        except UserError as error:
            reason = str(error).partition(";")[0]
            raise UserError(
                f"{reason}; extract the archive of {_OFFICIAL} and pass its stl10_binary as --data"
            ) from error
    if not is_binary(folder):
        return load_data(config)
    if not (data.max_train is data.max_test is data.val_fraction is None):
        flags = "--max-train, --max-test and --val-fraction"
        raise UserError(f"{flags} do not apply to the official folder stl10_binary; drop them")
    names = (folder / "class_names.txt").read_text().split()
    return Dataset(NAME, tuple(names), *(read_binary(folder, split) for split in ("train", "test")))


def is_binary(folder: Path) -> bool:
    """Whether `folder` is the extracted official archive."""
    return (folder / "train_X.bin").is_file()


def read_binary(folder: Path, split: str) -> Split:
    """A labelled split of the official binary files; images stay on disk until they are read.

    Raises:
        UserError: a file that is missing or truncated.
    """
    paths = [folder / f"{split}_{part}.bin" for part in "Xy"]
    try:
        labels = np.fromfile(paths[1], np.uint8).astype(np.int64) - 1
        pixels = np.memmap(paths[0], np.uint8, "r").reshape(len(labels), 3, _SIDE, _SIDE)  # the columns come first
        content = sha256_of_file(paths[0])
    except (OSError, ValueError) as error:
        raise UserError(
            f"{paths[0]} and {paths[1].name} are not complete STL-10 files ({error}); get them from {_OFFICIAL}"
        ) from error
    ids = [f"{split}/{i}" for i in range(len(labels))]
    return Split(split, ids, labels, lambda i: np.ascontiguousarray(pixels[i].T), digest(content, labels.tobytes()))


def read_folds(path: Path, images: int) -> list[np.ndarray]:
    """The numbers of the images of every fold.

    Raises:
        UserError: `path` is not such a file, or is of other images.
    """
    try:
        folds = [
            np.array(line.split(), np.int64) for line in path.expanduser().read_text().splitlines() if line.split()
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"--folds {path} is not a list of image numbers ({error}); get it from {_OFFICIAL}") from error
    if len(folds) < 2:
        raise UserError(f"--folds {path} holds {len(folds)} lines; it needs one for each of several folds")
    for number, fold in enumerate(folds, 1):
        if len(np.unique(fold)) < len(fold) or fold.min() < 0 or fold.max() >= images:
            raise UserError(f"--folds {path}: line {number} does not name different images among 0 to {images - 1}")
    return folds


def official_places(data: str, split: Split) -> np.ndarray:
    """The place in the split of each image of the official files.

    Raises:
        UserError: the images of a folder are not named by their numbers.
    """
    images, folder = len(split), Path(data).expanduser()
    if is_binary(folder):
        return np.arange(images)
    if not folder.is_dir():
        return _places_in_tfds(images)
    stems = [Path(name).stem for name in split.ids]
    if not all(stem.isdecimal() for stem in stems) or {int(stem) for stem in stems} != set(range(images)):
        raise UserError(
            f"--folds: the training images in {data} are not named 0 to {images - 1}, so the official numbers do not "
            "apply to them; pass the extracted folder stl10_binary, or --data stl10"
        )
    return np.argsort([int(stem) for stem in stems])


def _places_in_tfds(images: int) -> np.ndarray:
    """TensorFlow Datasets sorts by a hash of the official number (`core/hashing.py`), with the split's name as salt."""
    hashes = [int(hashlib.md5(f"train{i}".encode(), usedforsecurity=False).hexdigest(), 16) for i in range(images)]
    places = np.empty(images, np.int64)
    places[sorted(range(images), key=hashes.__getitem__)] = np.arange(images)
    return places


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(command_line(Config, "experiments.stl10_transfer", __doc__, args))


if __name__ == "__main__":
    main()
