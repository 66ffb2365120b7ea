"""The images of an embedding file that are most similar to a photo.

    python -m experiments.search features.parquet photo.jpg
    python -m experiments.search features.parquet path/to/photos --k 20 --root new/place/of/the/images

The search is exact: every image is compared, by the cosine of its features. The photos go through the model that the
file was made with, at the same size; another model is refused. A photo that is in the file itself is left out of its
own results, unless --self is given.

The output folder gets search.csv with all results, search.html with thumbnails (one file that needs no network),
search.png with the first photos, and config.json.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from experiments.gallery.bank import Bank, TableSettings, open_bank
from experiments.gallery.queries import BankModel, embed_photos
from experiments.runs.command_line import command_line
from experiments.runs.settings import POSITIVE, Flags, FolderSettings, check_bounds, flat, require

if TYPE_CHECKING:
    from experiments.gallery.page import Card

_PRINTED, _DRAWN, _ON_PAGE = 10, 16, 100  # photos
_K, _MOST_DRAWN = 10, 8  # images for each photo: found by default, and drawn on the sheet with the photo


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """The photos, and how many images are found."""

    photos: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOS…", help_behavior_hint="(one or more)")
    ]
    """Photos to search for (JPEG, PNG, WebP and others), or folders of them."""
    k: Annotated[int | None, POSITIVE] = None
    """Number of images to find for each photo. None takes 10, or all if there are fewer."""
    include_self: Annotated[bool, tyro.conf.arg(name="self")] = False
    """Whether a photo that is in the embedding file itself is among its own results."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The most similar images of an embedding file."""

    bank: Flags[TableSettings]
    search: Flags[SearchSettings]
    model: Flags[BankModel] = BankModel()
    output: Flags[FolderSettings] = FolderSettings()


@dataclasses.dataclass(frozen=True)
class Hits:
    """What was found for a photo: indices of the bank and cosine similarities, best first.

    `own` is the index of the photo itself, where it is among them or was left out.
    """

    photo: Path
    indices: list[int]
    similarities: list[float]
    own: int | None


def run(config: Config) -> list[Hits]:
    """Searches for every photo; returns what was found, in the order of the photos.

    Raises:
        UserError: photos, an embedding file or a model that cannot be used.
    """
    from experiments.data.files import readable_images
    from experiments.runs import records

    check_bounds(config)
    if not config.search.photos:
        raise UserError("no photos were given; name image files or folders after the embedding file")
    bank = open_bank(config.bank)
    k = config.search.k or min(_K, len(bank))
    require(k <= len(bank), "k", k, f"between 1 and the {len(bank):,} images of {bank.table}")
    photos = list(readable_images(config.search.photos))
    out = config.output.out or records.default_run_folder("search")
    with records.run_folder(out) as folder:
        features = embed_photos(photos, bank, config.model, config.output.cache_dir)
        hits = _search(bank, photos, features, k, include_self=config.search.include_self)
        _write_csv(folder / "search.csv", bank, hits)
        records.write_json(folder / records.CONFIG_FILE, flat(config))
    with records.run_folder(out) as folder:
        _draw(folder, bank, hits)
    _print(bank, hits, out)
    return hits


def _search(bank: Bank, photos: Sequence[Path], features: np.ndarray, k: int, *, include_self: bool) -> list[Hits]:
    from dinojax.retrieval import nearest

    more = min(k if include_self else k + 1, len(bank))
    hits = []
    for photo, scores, indices in zip(photos, *nearest(bank.features, features, more)):
        own = next((int(index) for index in indices if _same_file(photo, bank.file(int(index)))), None)
        found = [place for place, index in enumerate(indices) if include_self or index != own][:k]
        hits.append(Hits(photo, indices[found].tolist(), scores[found].astype(float).tolist(), own))
    return hits


def _same_file(one: Path, other: Path | None) -> bool:
    try:
        return other is not None and other.samefile(one)
    except OSError:  # an image that is no longer there
        return False


def _write_csv(path: Path, bank: Bank, hits: Sequence[Hits]) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(("photo", "rank", "similarity", "path"))
        for one in hits:
            for rank, (index, similarity) in enumerate(zip(one.indices, one.similarities), 1):
                writer.writerow((one.photo, rank, f"{similarity:.6f}", bank.paths[index]))


def _draw(folder: Path, bank: Bank, hits: Sequence[Hits]) -> None:
    """Writes the page and the contact sheet."""
    from experiments.data.files import readable_name
    from experiments.figures.sheets import Band, Cell, save_sheet
    from experiments.gallery.page import Card, Section, render_page
    from experiments.gallery.thumbnails import thumbnails

    shown = hits[:_ON_PAGE]
    images = thumbnails(bank.files(dict.fromkeys(index for one in shown for index in one.indices)))
    photos = thumbnails(dict(enumerate(one.photo for one in shown)))
    sections = []
    for number, one in enumerate(shown):
        name = readable_name(one.photo)
        first = Card(photos.get(number), "photo", name, marked=True)
        sections.append(Section(title := readable_name(one.photo.name), title, [first, *_cards(bank, one, images)]))
    about = [f"{len(bank):,} images of {readable_name(bank.table)}, compared by cosine similarity", bank.about]
    if len(hits) > len(shown):
        about.append(f"The first {len(shown)} of {len(hits):,} photos; search.csv has all of them.")
    page = render_page("Similar images", about, sections)
    (folder / "search.html").write_text(page, encoding="utf-8")
    bands = [
        Band(section.heading, [Cell(c.thumbnail, c.heading, c.name, c.marked) for c in section.cards[:_MOST_DRAWN]])
        for section in sections[:_DRAWN]
    ]
    save_sheet(folder / "search.png", bands, title="Similar images", note=f"{about[0]}; {bank.about}")


def _cards(bank: Bank, hits: Hits, images: dict) -> list["Card"]:
    from experiments.gallery.page import Card

    cards = []
    for rank, (index, similarity) in enumerate(zip(hits.indices, hits.similarities), 1):
        lines = ("the photo itself",) if index == hits.own else ()
        cards.append(Card(images.get(index), f"{rank} · {similarity:.3f}", bank.paths[index], lines))
    return cards


def _print(bank: Bank, hits: Sequence[Hits], out: Path) -> None:
    """Prints a table for each of the first photos."""
    from experiments.data.files import readable_name

    print(f"\n{bank.about}; {len(bank):,} images")
    for one in hits[:_PRINTED]:
        print(f"\n{readable_name(one.photo)}")
        for rank, (index, similarity) in enumerate(zip(one.indices, one.similarities), 1):
            note = "   (the photo itself)" if index == one.own else ""
            print(f"{rank:>4}  {similarity:6.3f}  {bank.paths[index]}{note}")
    if len(hits) > _PRINTED:
        print(f"\n… and {len(hits) - _PRINTED:,} more photos in search.csv")
    print()
    for name in ("search.csv", "search.html", "search.png"):
        print(f"  {out / name}")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(command_line(Config, "experiments.search", __doc__, args))


if __name__ == "__main__":
    main()
