"""Groups of near-duplicates among the images of an embedding file.

    python -m experiments.duplicates features.parquet
    python -m experiments.duplicates features.parquet --threshold 0.98 --root new/place/of/the/images

Two images are near-duplicates if the cosine similarity of their features is at least --threshold. A group is connected
by such pairs: the ends of a chain may be less similar to each other. All pairs are compared. In each group, the image
with the most pixels is the one to keep. No image is changed or removed.

With --whiten, directions in which all images differ count less, so that more edited copies are found among fewer false
ones; it needs twice as many images as a feature has numbers. The right threshold depends on the model:
`python -m benchmarks.duplicates --data FOLDER --weights WEIGHTS` measures it on copies that it makes of your images.

The output folder gets duplicates.csv with all groups, duplicates.html with thumbnails (one file that needs no network),
duplicates.png with the largest groups, and config.json.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np

from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from experiments.gallery.bank import Bank, OutputSettings, TableSettings, open_bank
from experiments.runs.command_line import command_line
from experiments.runs.settings import Bound, Flags, check_bounds, flat

if TYPE_CHECKING:
    from experiments.gallery.page import Card

_PRINTED, _BANDS = 15, 24  # groups
_PER_GROUP, _ON_PAGE, _DRAWN = 48, 1500, 160  # images
_THRESHOLDS = {False: 0.99, True: 0.7}  # by whether features are whitened; see docs/searching.md
IMAGES_PER_NUMBER = 2  # that a whitening needs
_COSINE = Bound(lambda value: 0 < value <= 1, "above 0 and up to 1")


@dataclasses.dataclass(frozen=True)
class DuplicateSettings:
    """What counts as a duplicate."""

    threshold: Annotated[float | None, _COSINE] = None
    """Least cosine similarity of two near-duplicates. None takes 0.99, or 0.7 with --whiten."""
    whiten: bool = False
    """Whether to whiten the features (PCA, learned on the images of the file) before they are compared."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Groups of near-duplicates among the images of an embedding file."""

    bank: Flags[TableSettings]
    duplicates: Flags[DuplicateSettings] = DuplicateSettings()
    output: Flags[OutputSettings] = OutputSettings()


@dataclasses.dataclass(frozen=True)
class Group:
    """Near-duplicates, by their indices in the bank.

    Attributes:
        images: the one to keep first, then the others, the most similar to it first.
        to_kept: similarity of each to the one to keep.
        to_nearest: similarity of each to the most similar other image.
    """

    images: list[int]
    to_kept: list[float]
    to_nearest: list[float]


def run(config: Config) -> list[Group]:
    """Finds the groups; returns them, the largest first.

    Raises:
        UserError: an embedding file that cannot be used.
    """
    from experiments.runs import records

    check_bounds(config)
    bank, whitened = open_bank(config.bank), config.duplicates.whiten
    threshold = config.duplicates.threshold or _THRESHOLDS[whitened]
    bank = _whitened(bank) if whitened else bank
    out = config.output.out or records.default_run_folder("duplicates")
    with records.run_folder(out) as folder:
        groups = _find(bank, threshold)
        _write_csv(folder / "duplicates.csv", bank, groups)
        records.write_json(folder / records.CONFIG_FILE, flat(config))
    with records.run_folder(out) as folder:
        files = _draw(folder, bank, groups, threshold)
    _print(bank, groups, threshold)
    for name in ("duplicates.csv", *files):
        print(f"  {out / name}")
    return groups


def _whitened(bank: Bank) -> Bank:
    """The bank with whitened features."""
    from dinojax.retrieval import fit_whitening, whiten

    needed = IMAGES_PER_NUMBER * bank.features.shape[1]
    if len(bank) < needed:
        raise UserError(f"--whiten needs {needed:,} images or more, and {bank.table} holds {len(bank):,}; leave it out")
    unit = bank.unit()
    return dataclasses.replace(bank, features=whiten(unit, fit_whitening(unit)), feature=f"{bank.feature} (whitened)")


def _find(bank: Bank, threshold: float) -> list[Group]:
    from tqdm import tqdm

    from dinojax.retrieval import similar_groups

    pairs = len(bank) * (len(bank) - 1) // 2
    with tqdm(total=pairs, desc="comparing", unit="pair", unit_scale=True, dynamic_ncols=True, delay=1) as bar:
        found = similar_groups(bank.features, threshold, progress=bar.update)
    order = np.argsort(found.labels, kind="stable")
    starts = np.flatnonzero(np.diff(found.labels[order], prepend=-1))
    members = [group for group in np.split(order, starts[1:]) if len(group) > 1]
    unit = bank.unit()
    groups = [_group(bank, unit, images, found.similarity) for images in members]
    return sorted(groups, key=lambda group: (-len(group.images), min(group.images)))


def _group(bank: Bank, unit: np.ndarray, images: np.ndarray, nearest: np.ndarray) -> Group:
    """The image with the most pixels first; ties go to the lower index."""
    pixels = bank.sizes[images].astype(np.int64).prod(axis=1)
    kept = images[pixels.argmax()]
    similarity = unit[images] @ unit[kept]
    similarity[images == kept] = 1
    order = np.lexsort((images, -similarity, images != kept))
    return Group(images[order].tolist(), similarity[order].astype(float).tolist(), nearest[images[order]].tolist())


def _write_csv(path: Path, bank: Bank, groups: Sequence[Group]) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(("group", "path", "keep", "width", "height", "similarity_to_kept", "similarity_to_nearest"))
        for number, group in enumerate(groups, 1):
            for place, (image, kept, nearest) in enumerate(zip(group.images, group.to_kept, group.to_nearest)):
                height, width = bank.sizes[image]
                keep = "yes" if place == 0 else "no"
                writer.writerow((number, bank.paths[image], keep, width, height, f"{kept:.6f}", f"{nearest:.6f}"))


def _draw(folder: Path, bank: Bank, groups: Sequence[Group], threshold: float) -> list[str]:
    """Writes the page, and the contact sheet if there is a group; returns their names."""
    from experiments.data.files import readable_name
    from experiments.figures.sheets import Band, Cell, save_sheet
    from experiments.gallery.page import Section, render_page
    from experiments.gallery.thumbnails import first_of_each, thumbnails

    shown = first_of_each([group.images for group in groups], _PER_GROUP, _ON_PAGE)
    images = thumbnails(bank.files(image for group in shown for image in group))
    sections = []
    for number, (group, some) in enumerate(zip(groups, shown), 1):
        left = len(group.images) - len(some)
        note = f"The first {len(some)} of them; duplicates.csv has all." if left else ""
        heading = f"Group {number}: {len(group.images):,} images"
        sections.append(
            Section(heading, f"{number} ({len(group.images):,})", list(_cards(bank, group, some, images)), note)
        )
    about = [_summary(bank, groups, threshold), f"{readable_name(bank.table)}; {bank.about}"]
    if len(groups) > len(shown):
        about.append(f"The first {len(shown):,} of {len(groups):,} groups; duplicates.csv has all of them.")
    (folder / "duplicates.html").write_text(render_page("Near-duplicates", about, sections), encoding="utf-8")
    if not groups:
        return ["duplicates.html"]
    drawn = first_of_each(shown[:_BANDS], 16, _DRAWN)
    bands = [
        Band(section.heading, [Cell(c.thumbnail, c.heading, c.name, c.marked) for c in section.cards[: len(some)]])
        for section, some in zip(sections, drawn)
    ]
    save_sheet(folder / "duplicates.png", bands, title="Near-duplicates", note=f"{about[0]} {bank.about}")
    return ["duplicates.html", "duplicates.png"]


def _cards(bank: Bank, group: Group, shown: Sequence[int], images: dict) -> Iterator["Card"]:
    from experiments.gallery.page import Card

    for place, (image, similarity) in enumerate(zip(shown, group.to_kept)):
        height, width = bank.sizes[image]
        heading = f"{similarity:.3f}" if place else "keep"
        yield Card(images.get(image), heading, bank.paths[image], (f"{width}×{height} px",), marked=place == 0)


def _summary(bank: Bank, groups: Sequence[Group], threshold: float) -> str:
    among = sum(len(group.images) for group in groups)
    return (
        f"{len(bank):,} images; {len(groups):,} groups of {among:,} images at a similarity of {threshold:g} or more, "
        f"of which {among - len(groups):,} repeat another."
    )


def _print(bank: Bank, groups: Sequence[Group], threshold: float) -> None:
    """Prints the first groups."""
    print(f"\n{bank.about}\n{_summary(bank, groups, threshold)}\n")
    for number, group in enumerate(groups[:_PRINTED], 1):
        first, *others = group.images
        print(f"{number:>4}  keep   {bank.paths[first]}")
        for image, similarity in list(zip(others, group.to_kept[1:]))[:5]:
            print(f"      {similarity:.3f}  {bank.paths[image]}")
        if len(others) > 5:
            print(f"      … and {len(others) - 5:,} more")
    if len(groups) > _PRINTED:
        print(f"   … and {len(groups) - _PRINTED:,} more groups in duplicates.csv")
    print()


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(command_line(Config, "experiments.duplicates", __doc__, args))


if __name__ == "__main__":
    main()
