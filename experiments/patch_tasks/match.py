"""Patches of two photos that are each other's nearest.

    python -m experiments.patches match dinov2_vits14 one.jpg other.jpg
    python -m experiments.patches match dinojax_vitt one.jpg other.jpg --image-size 160 --lines 40

Two patches match if each is the most similar of its photo to the other, by the cosine of their features. The output
folder gets match.png, both photos side by side with lines between matches, the most similar of each part of the first
photo; matches.csv, the centres of all matches in pixels of the files, the most similar first; and config.json.
"""

import csv
import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from experiments.patch_tasks.model import Kind, PatchBackbone, PatchModel, Photo
from experiments.runs.settings import POSITIVE, Bound, Flags, RunSettings, check_bounds, flat

_PARTS = 8  # along each side of the first photo, for the choice of what is drawn
_COSINE = Bound(lambda value: -1 <= value <= 1, "between -1 and 1")


@dataclasses.dataclass(frozen=True)
class MatchSettings:
    """The two photos, and which matches are kept."""

    first: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PHOTO")]
    """First photo (JPEG, PNG, WebP and others)."""
    second: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PHOTO")]
    """Second photo, of any other size."""
    features: Kind = "tokens"
    """Features that are compared: the patch tokens after the final norm, or the keys of the last attention."""
    least_similarity: Annotated[float, _COSINE] = -1.0
    """Least cosine similarity of a match."""
    lines: Annotated[int, POSITIVE] = 60
    """Most lines that are drawn."""


@dataclasses.dataclass(frozen=True)
class MatchConfig:
    """Matching patches of two photos."""

    model: Flags[PatchBackbone]
    match: Flags[MatchSettings]
    run: Flags[RunSettings] = RunSettings()


def run_match(config: MatchConfig) -> list[tuple[float, ...]]:
    """Matches the photos; returns the rows of matches.csv: x, y, x, y and the similarity.

    Raises:
        UserError: photos, weights or settings that cannot be used.
    """
    from dinojax.patches import mutual_matches
    from experiments.figures.patches import save_matches
    from experiments.runs import records

    check_bounds(config)
    settings = config.match
    model = PatchModel(config.model, seed=config.run.seed, cache_dir=config.run.cache_dir)
    photos = [model.photo(file.expanduser()) for file in (settings.first, settings.second)]
    out = config.run.out or records.default_run_folder("patches-match")
    with records.run_folder(out) as folder:
        model.note_size(photos[0], "2 photos")
        features = [model.features(photo, settings.features) for photo in photos]
        found = mutual_matches(*(one.reshape(-1, one.shape[-1]) for one in features))
        kept = found.similarity >= settings.least_similarity
        places = [
            model.patch_size * (np.stack(np.divmod(index[kept], one.shape[1]), axis=1) + 0.5)
            for index, one in zip(found[:2], features)
        ]
        rows = _rows(photos, places, found.similarity[kept])
        with (folder / "matches.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("first_x", "first_y", "second_x", "second_y", "similarity"))
            writer.writerows([*(f"{value:.1f}" for value in row[:4]), f"{row[4]:.6f}"] for row in rows)
        records.write_json(folder / records.CONFIG_FILE, flat(config))
        drawn = _spread(places[0], photos[0].pixels.shape[:2])[: settings.lines]
        title = f"{len(rows):,} matching patches of {settings.first.name} and {settings.second.name}"
        note = f"{model.about}; {len(drawn)} of them, the most similar of each part of the first photo"
        save_matches(
            folder / "match.png", [photo.pixels for photo in photos], [one[drawn] for one in places], title=title,
            note=note,
        )  # fmt: skip
    print(f"{len(rows):,} matches\n")
    for name in ("match.png", "matches.csv"):
        print(f"  {out / name}")
    return rows


def _rows(photos: list[Photo], places: list[np.ndarray], similarity: np.ndarray) -> list[tuple[float, ...]]:
    return [
        (*photos[0].to_file(*map(float, one)), *photos[1].to_file(*map(float, other)), float(value))
        for one, other, value in zip(*places, similarity)
    ]


def _spread(places: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Matches in the order in which they are drawn: the best of each part of the photo, then the second of each.

    The most similar ones of all often lie together, in a sky for example.
    """
    rows, columns = (places * _PARTS // np.array(size)).astype(int).T
    taken: dict[tuple[int, int], int] = {}
    ranks = []
    for part in zip(rows.tolist(), columns.tolist()):
        ranks.append(taken.get(part, 0))
        taken[part] = ranks[-1] + 1
    return np.argsort(np.array(ranks, int), kind="stable")
