"""Folders of class folders: one reader for every command, and one table of what their splits are called.

No image is decoded. Files are read only to find copies, and only where their sizes are equal.
"""

import dataclasses
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from dinojax.errors import UserError
from dinojax.images.decode import SUFFIXES
from experiments.data.files import find_images, no_images, notes_about, readable_name, split_of_files
from experiments.data.image_copies import find_copies
from experiments.data.splits import Dataset, Split, limit_images

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_EVALUATED_NAMES = SPLIT_NAMES["test"] + SPLIT_NAMES["validation"]
_FLAG_NAMES = {"train": "train", "validation": "val", "test": "test"}  # --val-split
_TRAIN_AND_TEST = "images belong in train/<class>/ and test/<class>/"
_OR_DIVIDED = ", or in <class>/ with --val-fraction 0.2"
_TRAIN_AND_VALIDATION = "images belong in training/<class>/ and validation/<class>/, or in <class>/ with --val-fraction"
_MOST_COMPARED = 200_000  # images; opening a million files over a network takes long

Files = dict[str, list[Path]]


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Images to train on, to choose the best epoch by and, where there are any, to test the result on.

    `notes` are sentences that the user should read.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split | None
    notes: tuple[str, ...] = ()


def load_folder(
    root: Path,
    *,
    val_fraction: float | None = None,
    dividable: bool = False,
    max_train: int | None = None,
    max_test: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Training and test images from `train/<class>/…` and `test/<class>/…`, or any other of `SPLIT_NAMES`.

    Images may lie at any depth below their class. Without a test folder, the validation images are evaluated, and the
    split is called validation. With `val_fraction`, they are a share of the training images, which may lie in
    `<class>/…` alone.

    Args:
        root: folder.
        val_fraction: share of the images of each class, at least one, that become the validation images.
        dividable: whether the command has --val-fraction, for its messages.
        max_train: number of training images to draw, from every class in proportion to its size. None takes all.
        max_test: number of test images to draw, in the same way.
        seed: of the draws.

    Raises:
        UserError: the folder has no training or no test images, an empty class, a class without training images, or
            one class only; or the fraction is superfluous or out of range.
    """
    root, expected = root.expanduser(), _TRAIN_AND_TEST + (_OR_DIVIDED if dividable else "")
    folders = _evaluated_folders(root, expected) if val_fraction is None else _one_folder(root, val_fraction)
    files, notes = _files_of_splits(root, folders, expected)
    if val_fraction is not None:
        files["train"], files["validation"] = _divide(files["train"], val_fraction, seed)
    _, evaluated = files
    limits = {"train": ("--max-train", max_train), evaluated: ("--max-test", max_test)}
    classes, splits, more = _labelled(root, files, limits, seed, expected)
    return Dataset(root.resolve().name, classes, splits["train"], splits[evaluated], (*notes, *more))


def _evaluated_folders(root: Path, expected: str) -> dict[str, Path]:
    """The folders of the training images and of the test images, or of the validation images where no others are."""
    train, evaluated = _find_split(root, "train"), {"test": _find_split(root, "test")}
    if not evaluated["test"]:
        evaluated = {"validation": _find_split(root, "validation")}
    for found, names in ((train, SPLIT_NAMES["train"]), (*evaluated.values(), _EVALUATED_NAMES)):
        if found is None:
            raise UserError(f"{_lacking(root, f'folder {_either(names)}')}: {expected}")
    return {"train": train, **evaluated}


def _one_folder(root: Path, fraction: float) -> dict[str, Path]:
    """The folder of the images that are divided."""
    _check_fraction(fraction)
    folders = _split_folders(root, dict.fromkeys(SPLIT_NAMES))
    for split in ("test", "validation"):
        if split in folders:
            raise _superfluous(root, fraction, split, folders[split])
    return folders


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
    """Training and validation images, and test images where there are any, from one of two layouts.

    The folder holds `training/<class>/…` and `validation/<class>/…` (or other names in `SPLIT_NAMES`), or `<class>/…`
    alone; then `val_fraction` divides the images. Images may lie at any depth below their class. Without validation
    images and without a fraction, the test images become the validation images.

    Args:
        root: folder.
        val_fraction: share of the training images of each class, at least one, that become the validation images.
        train_split: name of the folder of training images. None looks for those in `SPLIT_NAMES`.
        val_split: name of the folder of validation images, as above.
        test_split: name of the folder of test images, as above.
        max_train: number of training images to draw, from every class in proportion to its size. None takes all.
        max_val: number of validation images to draw, in the same way.
        seed: of the draws.

    Raises:
        UserError: the folder does not exist, has another layout, an empty class, a class without training images, or
            one class only; or the fraction is missing, superfluous or out of range.
    """
    root = root.expanduser()
    folders = _split_folders(root, dict(zip(SPLIT_NAMES, (train_split, val_split, test_split))))
    files, notes = _files_of_splits(root, folders, _TRAIN_AND_VALIDATION)
    if "validation" not in files or val_fraction is not None:
        notes += _add_validation(root, folders, files, val_fraction, seed)
    limits = {"train": ("--max-train", max_train), "validation": ("--max-val", max_val)}
    classes, splits, more = _labelled(root, files, limits, seed, _TRAIN_AND_VALIDATION)
    name = root.resolve().name
    return ImageFolder(name, classes, splits["train"], splits["validation"], splits.get("test"), (*notes, *more))


def _labelled(
    root: Path, files: dict[str, Files], limits: Mapping[str, tuple[str, int | None]], seed: int, expected: str
) -> tuple[tuple[str, ...], dict[str, Split], list[str]]:
    """Class names, splits and notes; the classes are those of the training images."""
    notes = _check_classes(root, files, expected)
    classes = tuple(files["train"])
    splits = {split: split_of_files(root, split, found, classes) for split, found in files.items()}
    for split, (flag, limit) in limits.items():
        splits[split] = limit_images(splits[split], limit, flag, seed)
    images = sum(map(len, splits.values()))
    if images > _MOST_COMPARED:
        return classes, splits, [*notes, f"{root.name}: {images:,} images are too many to look for copies among them"]
    return classes, splits, notes + find_copies(splits)


def _split_folders(root: Path, named: dict[str, str | None]) -> dict[str, Path]:
    """Split → its folder. In a folder of class folders alone, the training images are in the folder itself."""
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder")
    below = _folders(root)
    if not below:
        raise UserError(f"{_lacking(root, 'folders')}: {_TRAIN_AND_VALIDATION}")
    given, found = {name for name in named.values() if name is not None}, {}
    for split, name in named.items():
        flag = f"--{_FLAG_NAMES[split]}-split"
        if name is not None and not (root / name).is_dir():
            raise UserError(f"{flag} {name}: there is no such folder in {root}, which holds {_listing(root)}")
        folder = root / name if name is not None else _find_split(root, split, given, f"choose one with {flag}")
        if folder is not None:
            found[split] = folder
    # "train" is also a vehicle: beside other folders, none of which is called like a split, and without class folders
    # of its own, it is a class.
    vehicle = named["train"] is None and set(found) == {"train"} and len(below) > 1 and not _folders(found["train"])
    if vehicle or not found:
        return {"train": root}
    if "train" not in found:
        others = ", ".join(path.name for path in found.values())
        raise UserError(f"{root} holds {others} but no folder train or training; name it with --train-split")
    return found


def _find_split(
    root: Path, split: str, taken: Collection[str] = (), advice: str = "remove or rename one"
) -> Path | None:
    """The folder that has one of the usual names of a split, in capitals too, and is not `taken` for another split."""
    usual = [path for path in _folders(root) if path.name.lower() in SPLIT_NAMES[split] and path.name not in taken]
    if len(usual) > 1:
        raise UserError(f"{root} holds {' and '.join(path.name for path in usual)}, which mean the same; {advice}")
    return usual[0] if usual else None


def _folders(folder: Path, *, broken_links: Literal["ignored", "refused"] = "ignored") -> list[Path]:
    visible = [path for path in _content(folder) if not path.name.startswith((".", "__"))]
    broken = [path for path in visible if path.is_symlink() and not path.exists()]
    if broken and broken_links == "refused":
        raise UserError(f"{broken[0]} is a link to {broken[0].readlink()}, which does not exist; mend or remove it")
    return [path for path in visible if path.is_dir()]


def _content(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); change its permissions or remove it") from error


def _lacking(folder: Path, what: str) -> str:
    return f"{folder} holds no {what}, only {_listing(folder)}" if _content(folder) else f"{folder} is empty"


def _listing(folder: Path) -> str:
    names = [path.name for path in _content(folder)]
    return ", ".join([*names[:5], f"{len(names) - 5:,} more"] if len(names) > 5 else names) or "nothing"


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _files_of_splits(root: Path, folders: Mapping[str, Path], expected: str) -> tuple[dict[str, Files], list[str]]:
    """Image files by split and class, and notes about what is left out."""
    found, notes = {}, []
    for split, folder in folders.items():
        found[split], more = _class_files(root, folder, expected)
        notes += [*_loose_images(folder), *more]
    return found, notes


def _class_files(root: Path, folder: Path, expected: str) -> tuple[Files, list[str]]:
    """Image files by class, both sorted by name; and notes about what is left out.

    Names that differ only in how accents are encoded are one class.
    """
    files, searches = defaultdict(list), {}
    for path in _folders(folder, broken_links="refused"):
        searches[path] = find_images(path)
        if not searches[path].files:
            raise UserError(f"{no_images(path, searches[path])}: add some, or remove the empty class")
        files[unicodedata.normalize("NFC", readable_name(path.name))] += searches[path].files
    if not files:
        raise UserError(f"{_lacking(folder, 'class folders')}: {expected}")
    return dict(sorted(files.items())), notes_about(root, searches)


def _loose_images(folder: Path) -> list[str]:
    """A note about images beside the class folders."""
    loose = sorted(
        path.name
        for path in _content(folder)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    if not loose:
        return []
    more = f" and {len(loose) - 1:,} more" if len(loose) > 1 else ""
    return [f"{folder}: images beside the class folders are not used: {loose[0]}{more}"]


def _add_validation(
    root: Path, folders: dict[str, Path], files: dict[str, Files], fraction: float | None, seed: int
) -> list[str]:
    """Sets `files["validation"]` to some of the training images, or to the test images; returns notes."""
    if fraction is not None:
        _check_fraction(fraction)
    if "validation" in files:
        raise _superfluous(root, fraction, "validation", folders["validation"])
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


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise UserError(f"--val-fraction {fraction} is not between 0 and 1; take 0.2 for a fifth of the images")


def _superfluous(root: Path, fraction: float | None, split: str, folder: Path) -> UserError:
    return UserError(
        f"--val-fraction {fraction}: {root} has {split} images already, in {folder.name}; leave the flag out"
    )


def _divide(files: Files, fraction: float, seed: int) -> tuple[Files, Files]:
    """Moves that share of each class, rounded, to the second part; each part gets at least one image.

    How a class is divided does not depend on the other classes.
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


def _check_classes(root: Path, files: dict[str, Files], expected: str) -> list[str]:
    """Notes about classes that a split lacks.

    Raises:
        UserError: a class without training images, or one class only.
    """
    notes = []
    for split in [split for split in files if split != "train"]:
        unknown = [name for name in files[split] if name not in files["train"]]
        if unknown:
            count = sum(len(files[split][name]) for name in unknown)
            images = f"{count:,} {split} image{'s' if count > 1 else ''}"
            classes = f"class{'es' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown[:5]))}"
            raise UserError(f"{root}: {images} of {classes}, but no training images; add or remove them")
        absent = [name for name in files["train"] if name not in files[split]]
        if absent:
            notes.append(f"{root.name}: no {split} images of {', '.join(map(repr, absent))}")
    if len(files["train"]) < 2:
        raise UserError(f"{root}: one class, {next(iter(files['train']))!r}, leaves nothing to tell apart; {expected}")
    return notes
