"""Tiny-ImageNet in its official layout: `wnids.txt`, `train/<wnid>/images/`, `val/images/` and `val_annotations.txt`.

The labels of the official test split were never published; the validation split, whose labels are in a table beside
its images, is what one is judged on.
"""

from collections import defaultdict
from pathlib import Path

from dinojax.errors import UserError
from experiments.harness.datasets import Dataset, image_files, split_of_files

NAME = "tiny_imagenet"
FOLDER = "tiny-imagenet-200"
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_ANNOTATIONS = Path("val", "val_annotations.txt")


def is_tiny_imagenet(root: Path) -> bool:
    """Whether a folder has the official layout."""
    return (root / "wnids.txt").is_file() and (root / _ANNOTATIONS).is_file()


def find_tiny_imagenet(data_dir: Path | None) -> Path:
    """The extracted folder in `data_dir`, or in the working folder.

    Raises:
        UserError: it is not there; the message says where it comes from.
    """
    folder = (data_dir or Path()).expanduser() / FOLDER
    if not is_tiny_imagenet(folder):
        raise UserError(f"--data {NAME}: {folder} is not there; extract {URL} and pass its folder as --data")
    return folder


def load_tiny_imagenet(root: Path) -> Dataset:
    """The data set in a folder for which `is_tiny_imagenet` holds; incomplete classes are taken as they are.

    Raises:
        UserError: a class without training images, or a table that does not fit the images.
    """
    wnids = (root / "wnids.txt").read_text().split()
    train = {wnid: image_files(root / "train" / wnid / "images") for wnid in sorted(wnids)}
    empty = [wnid for wnid, files in train.items() if not files]
    if empty:
        raise UserError(f"{root / 'train' / empty[0] / 'images'} holds no images; extract {URL} again")
    classes = tuple(train)
    splits = (
        split_of_files(root, name, files, classes) for name, files in (("train", train), ("test", _val(root, classes)))
    )
    return Dataset(root.resolve().name, _names(root, classes), *splits)


def _val(root: Path, classes: tuple[str, ...]) -> dict[str, list[Path]]:
    """Validation images by class, from the table."""
    files = defaultdict(list)
    for line in (root / _ANNOTATIONS).read_text().splitlines():
        name, wnid, *_ = [*line.split("\t"), ""]
        file = root / "val" / "images" / name
        if wnid not in classes or not file.is_file():
            raise UserError(f"{root / _ANNOTATIONS}: no such class or image in {line!r}; extract {URL} again")
        files[wnid].append(file)
    return {wnid: files[wnid] for wnid in classes if wnid in files}


def _names(root: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The first word of each class, with its wnid where two share one."""
    lines = (root / "words.txt").read_text().splitlines() if (root / "words.txt").is_file() else []
    words = {wnid: text.split(",")[0] for wnid, _, text in (line.partition("\t") for line in lines)}
    first = [words.get(wnid, wnid) for wnid in classes]
    return tuple(name if first.count(name) == 1 else f"{name} ({wnid})" for name, wnid in zip(first, classes))
