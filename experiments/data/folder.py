"""A folder of class folders as training, validation and test images, and a word about each of its faults.

Nothing is decoded before it is asked for. Files are read only to find copies, and only where their sizes are equal.
"""

import dataclasses
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np

from dinojax.errors import UserError
from experiments.data.image_copies import find_copies
from experiments.data.splits import SUFFIXES, Dataset, Split, image_files, limit_images, split_of_files

FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "validation")}
ROLES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
FLAGS = {"train": "--train-split", "validation": "--val-split", "test": "--test-split"}
_EXPECTED = "images belong in training/<class>/ and validation/<class>/, or in <class>/ with --val-fraction"

Files = dict[str, list[Path]]


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Labelled images to train on, to choose the best epoch by, and to be judged on once, if there are such.

    `notes` are sentences the user should read.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split | None
    notes: tuple[str, ...] = ()


def load_image_folder(
    root: Path,
    *,
    val_fraction: float | None = None,
    train_split: str | None = None,
    val_split: str | None = None,
    test_split: str | None = None,
    max_train: int | None = None,
    max_val: int | None = None,
    seed: int = 0,
) -> ImageFolder:
    """A folder with `training/<class>/…` and `validation/<class>/…`, or with `<class>/…` alone and a fraction.

    Images may lie at any depth below their class. The usual names of the splits are known, in capitals too: train,
    training; val, valid, validation; test, testing. Without a validation split and a fraction, the test images take
    its place.

    Args:
        root: the folder.
        val_fraction: share of the training images of each class, at least one, that become the validation split.
        train_split: name of the folder of training images, if it is none of the usual.
        val_split: likewise.
        test_split: likewise.
        max_train: use this many training images, drawn from every class in proportion to its size.
        max_val: likewise.
        seed: of what is drawn.

    Raises:
        UserError: no such folder, another layout, an empty class, a class that is not among the training images, one
            class only, or a fraction that is missing, not wanted or out of range.
    """
    root = root.expanduser()
    folders = _split_folders(root, dict(zip(ROLES, (train_split, val_split, test_split))))
    files = {role: _class_files(folder) for role, folder in folders.items()}
    notes = [note for folder in folders.values() for note in _loose_images(folder)]
    if "validation" not in files or val_fraction is not None:
        notes += _add_validation(root, folders, files, val_fraction, seed)
    notes += _check_classes(root, files)
    classes = tuple(files["train"])
    splits = {role: split_of_files(root, role, found, classes) for role, found in files.items()}
    splits["train"] = limit_images(splits["train"], max_train, "--max-train", seed)
    splits["validation"] = limit_images(splits["validation"], max_val, "--max-val", seed)
    notes += find_copies(root, splits)
    name = root.resolve().name
    return ImageFolder(name, classes, splits["train"], splits["validation"], splits.get("test"), tuple(notes))


def _split_folders(root: Path, named: dict[str, str | None]) -> dict[str, Path]:
    """Where the images of each role are; in a folder of class folders, those of "train" are the folder itself."""
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder")
    below = _folders(root)
    if not below:
        raise UserError(f"{_lacking(root, 'folders')}: {_EXPECTED}")
    found = {}
    for role, name in named.items():
        if name is not None and not (root / name).is_dir():
            raise UserError(f"{FLAGS[role]} {name}: there is no such folder in {root}, which holds {_listing(root)}")
        usual = [path for path in below if path.name.lower() in ROLES[role] and path.name not in named.values()]
        if name is None and len(usual) > 1:
            both = " and ".join(path.name for path in usual)
            raise UserError(f"{root} holds {both}, which mean the same; choose one with {FLAGS[role]}")
        if name is not None or usual:
            found[role] = root / name if name is not None else usual[0]
    # "train" is also a vehicle: without class folders, among others that no split is called, it is a class itself.
    vehicle = named["train"] is None and set(found) == {"train"} and len(below) > 1 and not _folders(found["train"])
    if vehicle or not found:
        return {"train": root}
    if "train" not in found:
        others = ", ".join(path.name for path in found.values())
        raise UserError(f"{root} holds {others} but no folder train or training; name it with --train-split")
    return found


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _lacking(folder: Path, what: str) -> str:
    return f"{folder} holds no {what} but {_listing(folder)}" if any(folder.iterdir()) else f"{folder} is empty"


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join([*names[:5], f"{len(names) - 5:,} more"] if len(names) > 5 else names) or "nothing"


def _class_files(folder: Path) -> Files:
    """Image files by class, both in order of their names; names that merely encode an accent differently are one."""
    found = defaultdict(list)
    for path in _folders(folder):
        images = image_files(path)
        if not images:
            raise UserError(
                f"{path} holds no images ({', '.join(sorted(SUFFIXES))}): add some, or remove the empty class"
            )
        found[unicodedata.normalize("NFC", path.name)] += images
    if not found:
        raise UserError(f"{_lacking(folder, 'class folders')}: {_EXPECTED}")
    return dict(sorted(found.items()))


def _loose_images(folder: Path) -> list[str]:
    loose = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not loose:
        return []
    return [f"{folder}: images beside the class folders are not used: {loose[0]} and {len(loose) - 1:,} more"]


def _add_validation(
    root: Path, folders: dict[str, Path], files: dict[str, Files], fraction: float | None, seed: int
) -> list[str]:
    """Puts `files["validation"]` together from the training images, or from the test images; notes."""
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"--val-fraction {fraction} is not between 0 and 1; take 0.2 for a fifth of the images")
    if "validation" in files:
        raise UserError(
            f"--val-fraction {fraction}: {root} has validation images already, in {folders['validation'].name}; "
            "leave the flag out"
        )
    if fraction is not None:
        files["train"], files["validation"] = _divide(files["train"], fraction, seed)
        return []
    if "test" not in files:
        raise UserError(
            f"{root} has no validation images (it holds {_listing(root)}): add validation/<class>/, name their folder "
            "with --val-split, or take some of the training images with --val-fraction 0.2"
        )
    files["validation"] = files.pop("test")
    return [
        f"{root.name} has no validation split: the best epoch is chosen on the test images, so their accuracy is "
        "biased upwards; --val-fraction 0.2 chooses it on training images instead"
    ]


def _divide(files: Files, fraction: float, seed: int) -> tuple[Files, Files]:
    """Of each class that share, rounded, but at least one image, for the second part, and at least one for the first.

    A class is divided in the same way whatever the others are.
    """
    first, second = {}, {}
    for name, found in files.items():
        if len(found) < 2:
            raise UserError(f"class {name!r} has a single image, too few to divide; add images or remove the class")
        count = min(max(1, round(fraction * len(found))), len(found) - 1)
        chosen = set(np.random.default_rng(seed).permutation(len(found))[:count].tolist())
        second[name] = [path for i, path in enumerate(found) if i in chosen]
        first[name] = [path for i, path in enumerate(found) if i not in chosen]
    return first, second


def _check_classes(root: Path, files: dict[str, Files]) -> list[str]:
    notes = []
    for role in [role for role in files if role != "train"]:
        unknown = [name for name in files[role] if name not in files["train"]]
        if unknown:
            count = sum(len(files[role][name]) for name in unknown)
            classes = f"class{'es' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown[:5]))}"
            raise UserError(f"{root}: {count:,} {role} images of {classes}, but no training images; add or remove them")
        absent = [name for name in files["train"] if name not in files[role]]
        if absent:
            notes.append(f"{root.name}: no {role} images of {', '.join(map(repr, absent))}")
    if len(files["train"]) < 2:
        raise UserError(f"{root}: one class, {next(iter(files['train']))!r}, leaves nothing to tell apart; {_EXPECTED}")
    return notes


def load_folder(root: Path) -> Dataset:
    """A folder with `train/<class>/…` and `test/<class>/…` (also `training`, `val`, `validation`), nested at will.

    Raises:
        UserError: a split without a folder, classes or images, or a class that is only in the test set.
    """
    files = {split: _old_class_files(root, split) for split in FOLDERS}
    classes = tuple(sorted(files["train"]))
    unknown = sorted(set(files["test"]) - set(classes))
    if unknown:
        raise UserError(f"{root}: class {unknown[0]!r} is among the test folders but not among the training folders")
    absent = sorted(set(classes) - set(files["test"]))
    notes = (f"{root.name}: no test images of {', '.join(map(repr, absent))}",) if absent else ()
    train, test = (split_of_files(root, split, files[split], classes) for split in FOLDERS)
    return Dataset(root.resolve().name, classes, train, test, notes)


def _old_class_files(root: Path, split: str) -> dict[str, list[Path]]:
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
