"""One object in each photo, found without labels by LOST and by TokenCut.

    python -m experiments.patches discover dino_vits16 photo.jpg path/to/photos
    python -m experiments.patches discover dinojax_vitt photos --method token_cut --features tokens --tau 0.4

LOST starts at the patch that is similar to the fewest others and adds patches that resemble it. TokenCut cuts the graph
of similar patches in two. Both were published with the keys of the last attention, of DINO's models. They always return
an object, also of a photo without one.

The output folder gets discover.png, each photo with the object of each method; METHOD_NAME.png, the object's mask at
the size of the photo, 255 inside; boxes.csv with the boxes in pixels of the files; and config.json.
"""

import csv
import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from dinojax.errors import UserError
from experiments.patch_tasks.images import PhotoFiles, photo_files, resized_mask
from experiments.patch_tasks.model import Kind, PatchBackbone, PatchModel, Photo
from experiments.runs.settings import INNER_FRACTION, POSITIVE, Bound, Flags, RunSettings, check_bounds, flat

_METHODS = {"lost": "LOST", "token_cut": "TokenCut"}
_SIMILARITY = Bound(lambda value: -1 <= value < 1, "a cosine similarity of at least -1 and below 1")
_DRAWN = 24  # photos


@dataclasses.dataclass(frozen=True)
class DiscoverSettings:
    """How objects are found."""

    method: Literal["lost", "token_cut", "both"] = "both"
    """Method that finds the objects."""
    features: Kind = "keys"
    """Features that are compared: the keys of the last attention, or the patch tokens after the final norm."""
    expansion: Annotated[int, POSITIVE] = 100
    """Patches with the fewest similar ones, among which LOST finds those that join the seed."""
    tau: Annotated[float, _SIMILARITY] = 0.2
    """Cosine similarity above which TokenCut joins two patches."""
    edge: Annotated[float, INNER_FRACTION] = 1e-5
    """Weight of TokenCut's edges between other patches."""


@dataclasses.dataclass(frozen=True)
class DiscoverConfig:
    """An object in each photo, without labels."""

    model: Flags[PatchBackbone]
    files: Flags[PhotoFiles]
    discover: Flags[DiscoverSettings] = DiscoverSettings()
    run: Flags[RunSettings] = RunSettings()


@dataclasses.dataclass(frozen=True)
class Found:
    """The object of a photo: `mask` on the grid of patches, `box` as x, y, x, y in pixels of the file."""

    photo: Photo
    method: str
    mask: Any
    box: tuple[float, float, float, float]


def run_discover(config: DiscoverConfig) -> list[Found]:
    """Finds an object in every photo, by each method.

    Raises:
        UserError: photos, weights or settings that cannot be used.
    """
    from tqdm import tqdm

    from experiments.data.files import own_names, readable_name
    from experiments.runs import records

    check_bounds(config)
    files = photo_files(config.files.photos)
    model = PatchModel(config.model, seed=config.run.seed, cache_dir=config.run.cache_dir)
    out = config.run.out or records.default_run_folder("patches-discover")
    methods = [name for name in _METHODS if config.discover.method in (name, "both")]
    with records.run_folder(out) as folder:
        model.note_size(model.photo(files[0]), f"{len(files):,} photos")
        found, boxes, drawn = [], [], []
        names = own_names(files)
        for name, file in zip(tqdm(names, desc="photos", unit="img", dynamic_ncols=True, delay=1), files):
            photo = model.photo(file)
            objects = _objects(model, photo, methods, config.discover)
            for one in objects:
                boxes.append((readable_name(file), one.method, *(f"{value:.1f}" for value in one.box)))
                _write_mask(folder / f"{one.method}_{name}.png", one)
            if len(drawn) < _DRAWN:
                drawn.append((name, objects))
            found += [
                dataclasses.replace(one, photo=dataclasses.replace(photo, pixels=photo.pixels[:0])) for one in objects
            ]
        with (folder / "boxes.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as table:
            csv.writer(table).writerows([("photo", "method", "x_min", "y_min", "x_max", "y_max"), *boxes])
        records.write_json(folder / records.CONFIG_FILE, flat(config))
        _draw(folder / "discover.png", drawn, model.about, config.discover)
    print(f"{len(files):,} photos\n\n  {out / 'discover.png'}\n  {out / 'boxes.csv'}\n  {out}/METHOD_NAME.png")
    return found


def _objects(model: PatchModel, photo: Photo, methods: list[str], settings: DiscoverSettings) -> list[Found]:
    from dinojax import patches

    features = model.features(photo, settings.features)
    objects = []
    for method in methods:
        try:
            if method == "lost":
                one = patches.lost(features, expansion=settings.expansion)
            else:
                one = patches.token_cut(features, tau=settings.tau, edge=settings.edge)
        except UserError as error:
            raise UserError(f"{photo.file}: {error}") from error
        top, left, bottom, right = (model.patch_size * edge for edge in one.box)
        box = *photo.to_file(top, left), *photo.to_file(bottom, right)
        objects.append(Found(photo, method, one.mask, box))
    return objects


def _write_mask(path: Path, found: Found) -> None:
    from PIL import Image

    Image.fromarray(255 * resized_mask(found.mask, found.photo.size).astype(np.uint8)).save(path)


def _draw(path: Path, drawn: list[tuple[str, list[Found]]], about: str, settings: DiscoverSettings) -> None:
    from experiments.figures.patches import Panel, save_panels

    rows = []
    for name, objects in drawn:
        row = [Panel(objects[0].photo.pixels, name)]
        for one in objects:
            label = f"{_METHODS[one.method]}: {100 * one.mask.mean():.0f} % of the patches"
            row.append(Panel(one.photo.pixels, label, mask=one.mask, box=True))
        rows.append(row)
    title = "Objects found without labels, by the similarity of patches"
    save_panels(path, rows, title=title, note=f"{about}, {settings.features} of the last block")
