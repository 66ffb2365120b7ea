"""Tiny-ImageNet in its official layout: `wnids.txt`, `train/<wnid>/images/`, `val/images/` and `val_annotations.txt`.

It is read from the extracted folder or from the official zip. The labels of the official test split were never
published, so models are evaluated on the validation split, whose labels are in a table beside its images.
"""

import contextlib
import dataclasses
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dinojax.errors import UserError
from dinojax.images.decode import SUFFIXES
from experiments.data.files import split_of_files
from experiments.data.splits import Dataset

NAME = "tiny_imagenet"
FOLDER = "tiny-imagenet-200"
_ANNOTATIONS = "val/val_annotations.txt"


class Archive(NamedTuple):
    """A published file: its address, bytes, and SHA-256 in hexadecimal."""

    url: str
    size: int
    sha256: str


# The authors publish no digest. Independent projects recorded this size and SHA-256 of the file, among them t-SimCNE
# (berenslab/t-simcne, cnexp/dataset/tiny_imagenet.py).
ARCHIVE = Archive(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    248_100_043,
    "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The images of each class, as paths inside the data set.

    Attributes:
        class_names: the first word of each class, with its wnid where two classes share it; labels are indices.
        train: wnid → training images, for every wnid, in the order of the labels.
        validation: wnid → validation images, in the order of the table, for every wnid that has any.
    """

    class_names: tuple[str, ...]
    train: dict[str, list[str]]
    validation: dict[str, list[str]]


def is_tiny_imagenet(root: Path) -> bool:
    """Whether a folder has the layout of the official zip."""
    return (root / "wnids.txt").is_file() and (root / _ANNOTATIONS).is_file()


def load_tiny_imagenet(root: Path) -> Dataset:
    """The data set in a folder for which `is_tiny_imagenet` holds; a class may be incomplete.

    Raises:
        UserError: a class has no training images, or the table does not match the images.
    """
    layout = read_layout(root)
    train, test = (
        split_of_files(root, name, {wnid: [root / path for path in found[wnid]] for wnid in found}, list(layout.train))
        for name, found in (("train", layout.train), ("validation", layout.validation))
    )
    return Dataset(root.resolve().name, layout.class_names, train, test)


def read_layout(source: Path) -> Layout:
    """The layout of an extracted folder or of the official zip.

    Raises:
        UserError: a class has no training images, or the table does not match the images.
    """
    names = _file_names(source)
    with reading(source) as read:
        wnids = sorted(read("wnids.txt").decode().split())
        words = read("words.txt").decode() if "words.txt" in names else ""
        table = read(_ANNOTATIONS).decode()
    images = _by_folder(names)
    train = {wnid: images[f"train/{wnid}/images"] for wnid in wnids}
    empty = [wnid for wnid, found in train.items() if not found]
    if empty:
        raise UserError(f"{source / 'train' / empty[0] / 'images'} holds no images; extract {ARCHIVE.url} again")
    return Layout(_class_names(wnids, words), train, _validation(source, names, wnids, table))


@contextlib.contextmanager
def reading(source: Path) -> Iterator[Callable[[str], bytes]]:
    """Yields a function that reads a file of the folder or the zip by its path inside the data set."""
    if source.is_dir():
        yield lambda name: (source / name).read_bytes()
    else:
        with zipfile.ZipFile(source) as archive:
            yield lambda name: archive.read(f"{FOLDER}/{name}")


def _file_names(source: Path) -> set[str]:
    if source.is_dir():
        return {path.relative_to(source).as_posix() for path in source.rglob("*")}
    with zipfile.ZipFile(source) as archive:
        return {name.removeprefix(f"{FOLDER}/") for name in archive.namelist()}


def _by_folder(names: set[str]) -> defaultdict[str, list[str]]:
    """Folder → its images, sorted by name, without hidden ones."""
    folders = defaultdict(list)
    for name in sorted(names):
        path = PurePosixPath(name)
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            folders[str(path.parent)].append(name)
    return folders


def _validation(source: Path, names: set[str], wnids: list[str], table: str) -> dict[str, list[str]]:
    """wnid → validation images, from the table."""
    images = defaultdict(list)
    for line in table.splitlines():
        file, wnid, *_ = [*line.split("\t"), ""]
        name = f"val/images/{file}"
        if wnid not in wnids or name not in names:
            problem = f"no such class or image in {line!r}; extract {ARCHIVE.url} again"
            raise UserError(f"{source / _ANNOTATIONS}: {problem}")
        images[wnid].append(name)
    return {wnid: images[wnid] for wnid in wnids if wnid in images}


def _class_names(wnids: list[str], words: str) -> tuple[str, ...]:
    """The first word of each class, with its wnid where two classes share it."""
    texts = {wnid: text.split(",")[0] for wnid, _, text in (line.partition("\t") for line in words.splitlines())}
    first = [texts.get(wnid, wnid) for wnid in wnids]
    return tuple(name if first.count(name) == 1 else f"{name} ({wnid})" for name, wnid in zip(first, wnids))
