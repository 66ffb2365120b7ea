"""Photos and the mask or depth map of each, paired by the names of their files."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dinojax.errors import UserError
from dinojax.images.decode import SUFFIXES
from experiments.data.files import Found, find_images, no_images, notes_about, readable_name, split_of_paths
from experiments.data.folder import SPLIT_NAMES
from experiments.data.image_copies import find_copies
from experiments.data.splits import Split, digest

Task = Literal["segmentation", "depth"]
VAL_FRACTION = 0.2
_IMAGES = ("images", "image", "imgs", "img", "rgb", "photos")
_TARGETS = {
    "segmentation": ("masks", "mask", "labels", "annotations", "segmentation"),
    "depth": ("depth", "depths", "depth_maps"),
}
_SUFFIXES = {"segmentation": SUFFIXES, "depth": SUFFIXES | {".npy"}}
_NOUN = {"segmentation": "mask", "depth": "depth map"}
_MOST_COMPARED = 200_000  # images


class Pair(NamedTuple):
    """A photo and its mask or depth map."""

    image: Path
    target: Path


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Photos, and the masks or depth maps of the same numbers. `split.labels` are 0."""

    photos: Split
    targets: Split

    def __len__(self) -> int:
        return len(self.photos)

    @property
    def identity(self) -> str:
        """Hash of the photos and their targets."""
        return digest(self.photos.identity, self.targets.identity)


@dataclasses.dataclass(frozen=True)
class PairFolder:
    """Pairs to train on, to choose the best epoch by and, where there are any, to test the result on.

    `notes` are sentences that the user should read.
    """

    name: str
    splits: Mapping[str, Pairs]
    notes: tuple[str, ...] = ()


def find_pairs(
    root: Path,
    task: Task,
    *,
    val_fraction: float | None = None,
    target_suffix: str = "",
    max_train: int | None = None,
    max_val: int | None = None,
    seed: int = 0,
) -> PairFolder:
    """The pairs of images/… and masks/… (depth/…), which lie in train/ and val/, hold these two, or are divided.

    Args:
        root: folder.
        task: "segmentation" takes masks, "depth" depth maps, which may be .npy files.
        val_fraction: share of the training pairs that become the validation pairs. None takes `VAL_FRACTION` where no
            validation pairs are.
        target_suffix: end of the names of masks that those of photos lack, such as "_mask".
        max_train: number of training pairs to draw. None takes all.
        max_val: number of validation pairs to draw. None takes all.
        seed: of the draws.

    Raises:
        UserError: another layout, no pairs, or two files of one name.
    """
    root = root.expanduser()
    folders = _folders(root, task)
    notes: list[str] = []
    splits = {name: _paired(root, *pair, task, target_suffix, notes) for name, pair in folders.items()}
    rng = np.random.default_rng(seed)
    if "validation" not in splits:
        splits |= dict(zip(("train", "validation"), _divided(splits["train"], val_fraction or VAL_FRACTION, rng)))
    elif val_fraction is not None:
        raise UserError(f"--val-fraction {val_fraction}: {root} has validation images already; leave it out")
    for name, count in (("train", max_train), ("validation", max_val)):
        splits[name] = _drawn(splits[name], count, rng)
    found = {name: _as_splits(root, name, splits[name]) for name in SPLIT_NAMES if name in splits}
    if sum(map(len, found.values())) <= _MOST_COMPARED:
        notes += find_copies({name: pairs.photos for name, pairs in found.items()}, within=False)
    return PairFolder(root.resolve().name, found, tuple(notes))


def _folders(root: Path, task: Task) -> dict[str, tuple[Path, Path]]:
    """Split → its folder of photos and its folder of targets."""
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder")
    targets = _TARGETS[task]
    both = _one_of(root, _IMAGES), _one_of(root, targets)
    if all(both):
        inside = {split: tuple(_one_of(one, names) for one in both) for split, names in SPLIT_NAMES.items()}
        found = {split: pair for split, pair in inside.items() if all(pair)}
        return found if "train" in found else {"train": both}
    splits = {split: folder for split, names in SPLIT_NAMES.items() if (folder := _one_of(root, names))}
    found = {split: (_one_of(folder, _IMAGES), _one_of(folder, targets)) for split, folder in splits.items()}
    incomplete = [str(splits[split]) for split, pair in found.items() if not all(pair)]
    if "train" in found and not incomplete:
        return found
    place = incomplete[0] if incomplete else str(root)
    raise UserError(
        f"{place} holds no images/ beside {targets[0]}/; the {_NOUN[task]}s belong in FOLDER/{targets[0]}/ with photos "
        f"of the same names in FOLDER/images/, or both in FOLDER/train/ and FOLDER/val/"
    )


def _one_of(folder: Path, names: Sequence[str]) -> Path | None:
    """The first folder inside `folder` that has one of the names."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _paired(root: Path, images: Path, targets: Path, task: Task, suffix: str, notes: list[str]) -> list[Pair]:
    """The pairs of two folders; what has no partner is noted."""
    found = find_images(images), find_images(targets, _SUFFIXES[task])
    notes += notes_about(root, {images: found[0]}) + notes_about(root, {targets: found[1]})
    photos, others = (_by_name(*one) for one in ((images, found[0], ""), (targets, found[1], suffix)))
    pairs = [Pair(path, others[key]) for key, path in photos.items() if key in others]
    noun = _NOUN[task]
    if not pairs:
        if not photos:
            raise UserError(no_images(images, found[0]))
        first = next(iter(photos.values()))
        raise UserError(
            f"no {noun} in {targets} has the name of a photo in {images}: there is none for {first.name}"
            + ("" if suffix else f"; if the {noun}s end on something more, name it, such as --target-suffix _mask")
        )
    for alone, folder, what in (
        (photos.keys() - others.keys(), images, f"no {noun}"),
        (others.keys() - photos.keys(), targets, "no photo"),
    ):
        if alone:
            first = readable_name(min(alone))
            notes.append(f"{readable_name(folder)}: {what} for {first} and {len(alone) - 1:,} more; they are left out")
    return pairs


def _by_name(folder: Path, found: Found, suffix: str) -> dict[str, Path]:
    """Path inside the folder, without its last suffix and without `suffix` → file."""
    names: dict[str, Path] = {}
    for path in found.files:
        key = path.relative_to(folder).with_suffix("").as_posix()
        if not key.endswith(suffix):
            continue
        key = key.removesuffix(suffix) if suffix else key
        if key in names:
            raise UserError(f"{names[key]} and {path} have the same name, and both could be meant; remove one of them")
        names[key] = path
    return names


def _divided(pairs: list[Pair], fraction: float, rng: np.random.Generator) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs, at least one of each."""
    if len(pairs) < 2:
        raise UserError(f"{pairs[0].image}: one photo alone cannot be divided into training and validation images")
    count = min(max(1, round(fraction * len(pairs))), len(pairs) - 1)
    chosen = set(rng.permutation(len(pairs))[:count].tolist())
    return [p for i, p in enumerate(pairs) if i not in chosen], [p for i, p in enumerate(pairs) if i in chosen]


def _drawn(pairs: list[Pair], count: int | None, rng: np.random.Generator) -> list[Pair]:
    if count is None or count >= len(pairs):
        return pairs
    return [pairs[i] for i in np.sort(rng.permutation(len(pairs))[:count])]


def _as_splits(root: Path, name: str, pairs: Sequence[Pair]) -> Pairs:
    labels = np.zeros(len(pairs), np.int64)
    images, targets = zip(*pairs)
    return Pairs(split_of_paths(root, name, images, labels), split_of_paths(root, name, targets, labels))
