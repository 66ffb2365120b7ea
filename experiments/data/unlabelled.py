"""Images for training without labels: named data sets, and any folder of images, with or without labels."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from dinojax.errors import UserError
from experiments.data import tiny_imagenet
from experiments.data.files import find_images, no_images, notes_about, split_of_paths
from experiments.data.folder import SPLIT_NAMES
from experiments.data.load import load_dataset
from experiments.data.splits import Dataset, Split

HELD_OUT = "held-out"
NO_LABEL = -1
_SHARE, _LEAST, _LARGEST_SHARE, _MOST = 20, 32, 5, 2_000  # a twentieth, at least 32, at most a fifth and 2,000


def load_images(
    data: str, *, data_dir: Path | None = None, max_train: int | None = None, max_test: int | None = None
) -> Dataset:
    """The images that `data` names, with labels or without; without labels there are no class names.

    A folder has labels if it holds `train/<class>/…` of two classes or more, and `test/<class>/…` or
    `validation/<class>/…` (or other names in `SPLIT_NAMES`).

    Args:
        data: as for `load_dataset`, or any folder of images.
        data_dir: as for `load_dataset`.
        max_train: number of training images to draw. None takes all.
        max_test: number of test images, or of held-out images, to draw. None takes all.

    Raises:
        UserError: the images are not found, or too few.
    """
    root = Path(data).expanduser()
    limits = {"max_train": max_train, "max_test": max_test}
    plain = root.is_dir() and data not in ("digits", tiny_imagenet.NAME) and not tiny_imagenet.is_tiny_imagenet(root)
    if not plain:
        return load_dataset(data, data_dir=data_dir, **limits)
    splits = _split_folders(root)
    if not _has_classes(splits):
        return load_unlabelled(root, splits, **limits)
    try:
        return load_dataset(data, data_dir=data_dir, **limits)
    except UserError as error:
        raise UserError(f"{error}; {splits['train']} alone is read without labels") from error


def load_unlabelled(
    root: Path, splits: dict[str, Path], *, max_train: int | None = None, max_test: int | None = None
) -> Dataset:
    """Images of a folder at any depth: those to train on, and as `test` those that are held out.

    Args:
        root: folder.
        splits: folders of the training and of the held-out images in it. Without, a twentieth of the images is held
            out, drawn at random: at least 32, but no more than a fifth of the images, and no more than 2,000.
        max_train: number of training images to draw. None takes all.
        max_test: number of held-out images to draw. None takes all.

    Raises:
        UserError: fewer than two images, or a file that cannot be read.
    """
    searches = {folder: find_images(folder) for folder in (list(splits.values()) or [root])}
    for folder, found in searches.items():
        if not found.files:
            raise UserError(f"{no_images(folder, found)}; name a folder of images")
    files = [path for found in searches.values() for path in found.files]
    if len(files) < 2:
        raise UserError(f"{root} holds one image, {files[0].name}, which leaves none to hold out; add images")
    if splits:
        count = len(searches[splits["test"]].files)
        held_out = np.arange(len(files) - count, len(files))
    else:
        held_out = np.sort(np.random.default_rng(0).permutation(len(files))[: held_out_count(len(files))])
    train = np.setdiff1d(np.arange(len(files)), held_out)
    rows = {"train": _limited(train, max_train), HELD_OUT: _limited(held_out, min(max_test or _MOST, _MOST))}
    parts = {name: _split(root, name, [files[i] for i in chosen]) for name, chosen in rows.items()}
    counts = {name: len(part) for name, part in parts.items()}
    note = (
        f"{root} has no labels (train/<class>/ and test/<class>/): {counts['train']:,} images train, "
        f"{counts[HELD_OUT]:,} are held out for the feature rank, and k-NN and evaluation are left out"
    )
    notes = (note, *notes_about(root.parent, searches))
    return Dataset(root.resolve().name, (), parts["train"], parts[HELD_OUT], notes)


def held_out_count(images: int) -> int:
    """How many of two images or more are held out."""
    return max(1, min(max(images // _SHARE, _LEAST), images // _LARGEST_SHARE, _MOST))


def _split_folders(root: Path) -> dict[str, Path]:
    """ "train" and "test" → their folders, where there are both."""
    below = {path.name.lower(): path for path in _folders(root)}
    train, test = (
        next((below[name] for name in names if name in below), None)
        for names in (SPLIT_NAMES["train"], SPLIT_NAMES["test"] + SPLIT_NAMES["validation"])
    )
    return {"train": train, "test": test} if train and test else {}


def _has_classes(splits: dict[str, Path]) -> bool:
    return bool(splits) and len(_folders(splits["train"])) > 1 and len(_folders(splits["test"])) > 0


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}); change its permissions or remove it") from error


def _limited(rows: Int[np.ndarray, " images"], count: int | None) -> Int[np.ndarray, " chosen"]:
    """`count` of the rows, drawn at random, in order."""
    if count is None or count >= len(rows):
        return rows
    return rows[np.sort(np.random.default_rng(0).permutation(len(rows))[:count])]


def _split(root: Path, name: str, files: list[Path]) -> Split:
    return split_of_paths(root, name, files, np.full(len(files), NO_LABEL, np.int64))
