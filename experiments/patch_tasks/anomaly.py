"""Anomalies in photos: patches that are unlike every patch of normal photos.

    python -m experiments.patches anomaly dinov2_vits14 path/to/mvtec/bottle
    python -m experiments.patches anomaly dinov2_vits14 --normal path/to/good --test path/to/new/photos

The folder is one category in MVTec's layout: train/good, test/<kind> (good among them) and ground_truth/<kind>, whose
masks NAME_mask.png are not 0 in the anomaly. Or name a folder of normal photos and the photos to look at. The patches
of the normal photos become a bank, of which a greedy subset is kept (--coreset). A patch's anomaly is its cosine
distance to the nearest one of the bank; the map is enlarged and blurred, and the score of a photo is the largest value
of its map.

The output folder gets scores.csv, the most anomalous first; anomaly.png with their maps; result.json. Where kinds are
known, AUROC over images is printed, and with masks AUROC over pixels, with 95 % bootstrap intervals over the images.
"""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from dinojax.errors import UserError
from experiments.patch_tasks.images import read_mask
from experiments.patch_tasks.model import Kind, PatchBackbone, PatchModel, Photo
from experiments.runs.settings import NOT_NEGATIVE, POSITIVE, Bound, Flags, RunSettings, check_bounds, flat

GOOD = "good"
_SHARE = Bound(lambda value: 0 < value <= 1, "above 0 and up to 1")
_DRAWN, _PRINTED = 18, 15  # photos


@dataclasses.dataclass(frozen=True)
class AnomalySettings:
    """The photos, and how anomalies are found."""

    folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = None
    """Category in MVTec's layout, with train/good and test."""
    normal: Path | None = None
    """Folder of normal photos, instead of FOLDER."""
    test: Path | None = None
    """Folder of photos to look at, instead of FOLDER."""
    features: Kind = "tokens"
    """Features of the patches: the tokens after the final norm, or the keys of the last attention."""
    coreset: Annotated[float, _SHARE] = 0.1
    """Share of the bank's patches that is kept. 1 keeps all."""
    most_patches: Annotated[int, POSITIVE] = 100_000
    """Number of patches, drawn with the seed, that the subset is chosen from at most."""
    sigma_px: Annotated[float, NOT_NEGATIVE] = 4.0
    """Deviation in pixels, at the size that the model sees, of the Gaussian that blurs the maps."""


@dataclasses.dataclass(frozen=True)
class AnomalyConfig:
    """Photos and pixels that are unlike normal photos."""

    model: Flags[PatchBackbone]
    anomaly: Flags[AnomalySettings] = AnomalySettings()
    run: Flags[RunSettings] = RunSettings()


@dataclasses.dataclass(frozen=True)
class TestPhoto:
    """A photo to look at: its kind ("" where kinds are not known), and the mask of its anomaly if there is one."""

    __test__ = False  # pytest

    file: Path
    kind: str
    mask: Path | None


@dataclasses.dataclass(frozen=True)
class Scored:
    """A photo with its map at the size that the model sees, and where the anomaly is, if that is known."""

    test: TestPhoto
    score: float
    heat: Any
    truth: Any


def run_anomaly(config: AnomalyConfig) -> dict[str, Any]:
    """Scores every photo; returns what result.json holds.

    Raises:
        UserError: photos, weights or settings that cannot be used.
    """
    from tqdm import tqdm

    from experiments.runs import records

    check_bounds(config)
    settings = config.anomaly
    normal, tests = find_photos(settings)
    model = PatchModel(config.model, seed=config.run.seed, cache_dir=config.run.cache_dir)
    out = config.run.out or records.default_run_folder("patches-anomaly")
    with records.run_folder(out) as folder:
        model.note_size(model.photo(normal[0]), f"{len(normal):,} normal photos")
        bank, held = _bank(model, normal, settings, config.run.seed)
        print(f"{held:,} patches of normal photos, of which {len(bank):,} are kept; {len(tests):,} to test")
        bar = tqdm(tests, desc="photos", unit="img", dynamic_ncols=True, delay=1)
        scored = [_scored(model, test, bank, settings) for test in bar]
        result = evaluate(scored, seed=config.run.seed)
        result |= {"normal": len(normal), "bank": len(bank), "tested": len(tests)}
        scored.sort(key=lambda one: -one.score)
        _write(folder / "scores.csv", scored)
        records.write_json(folder / records.RESULT_FILE, result | {"environment": records.environment()})
        records.write_json(folder / records.CONFIG_FILE, flat(config))
        _draw(folder / "anomaly.png", model, scored, len(bank))
    _print(result, scored, out)
    return result


def find_photos(settings: AnomalySettings) -> tuple[list[Path], list[TestPhoto]]:
    """The normal photos, and those to look at.

    Raises:
        UserError: folders that hold no photos, or that contradict each other.
    """
    if settings.folder is not None:
        if settings.normal or settings.test:
            raise UserError("FOLDER and --normal or --test were given; give the folder of a category, or those two")
        return _mvtec(settings.folder.expanduser())
    if settings.normal is None or settings.test is None:
        raise UserError("give a category in MVTec's layout, or both --normal and --test")
    normal, test = (_photos(path.expanduser()) for path in (settings.normal, settings.test))
    return normal, [TestPhoto(file, "", None) for file in test]


def _photos(folder: Path) -> list[Path]:
    from experiments.data.files import find_images, no_images

    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a folder of photos")
    found = find_images(folder)
    if not found.files:
        raise UserError(no_images(folder, found))
    return found.files


def _mvtec(folder: Path) -> tuple[list[Path], list[TestPhoto]]:
    if not (folder / "train" / GOOD).is_dir() or not (folder / "test").is_dir():
        raise UserError(
            f"{folder} does not hold train/good and test; name a category in MVTec's layout, or use --normal and --test"
        )
    tests = []
    for kind in sorted(path for path in (folder / "test").iterdir() if path.is_dir() and not path.name.startswith(".")):
        for file in _photos(kind):
            masks = [folder / "ground_truth" / kind.name / f"{file.stem}{end}.png" for end in ("_mask", "")]
            mask = next((mask for mask in masks if mask.is_file()), None)
            tests.append(TestPhoto(file, kind.name, mask if kind.name != GOOD else None))
    if not tests:
        raise UserError(f"{folder / 'test'} holds no folder of photos; expected are test/good and test/<kind>")
    return _photos(folder / "train" / GOOD), tests


def _bank(model: PatchModel, files: Sequence[Path], settings: AnomalySettings, seed: int) -> tuple[np.ndarray, int]:
    """The kept patches of the normal photos, and how many there were."""
    from tqdm import tqdm

    from dinojax.patches import coreset

    rng, share = np.random.default_rng(seed), max(1, settings.most_patches // len(files))
    parts, held = [], 0
    for file in tqdm(files, desc="normal photos", unit="img", dynamic_ncols=True, delay=1):
        features = model.features(model.photo(file), settings.features)
        features = features.reshape(-1, features.shape[-1])
        held += len(features)
        drawn = np.sort(rng.permutation(len(features))[:share])
        parts.append(features[drawn])
    patches = np.concatenate(parts)
    count = max(1, round(settings.coreset * len(patches)))
    return (patches if count == len(patches) else patches[coreset(patches, count)]), held


def _scored(model: PatchModel, test: TestPhoto, bank: np.ndarray, settings: AnomalySettings) -> Scored:
    from dinojax.patches import anomaly_map, patch_distances
    from experiments.patch_tasks.images import resized_mask

    photo = model.photo(test.file)
    size = photo.pixels.shape[:2]
    heat = anomaly_map(
        patch_distances(model.features(photo, settings.features), bank), *size, sigma_px=settings.sigma_px
    )
    truth = None
    if test.mask is not None:
        truth = resized_mask(read_mask(test.mask, photo.size), size)
    elif test.kind == GOOD:
        truth = np.zeros(size, bool)
    return Scored(test, float(heat.max()), heat.astype(np.float32), truth)


def evaluate(scored: Sequence[Scored], *, seed: int) -> dict[str, Any]:
    """AUROC over images, and over the pixels of photos whose anomaly is known, with intervals; {} without kinds."""
    from experiments.patch_tasks.auroc import image_auroc, pixel_auroc

    found: dict[str, Any] = {}
    kinds = np.array([one.test.kind != GOOD for one in scored])
    if all(one.test.kind for one in scored) and kinds.any() and not kinds.all():
        found["image_auroc"] = image_auroc(np.array([one.score for one in scored]), kinds, seed=seed)
    known = [one for one in scored if one.truth is not None]
    if any(one.truth.any() for one in known):
        found["pixel_auroc"] = pixel_auroc([one.heat for one in known], [one.truth for one in known], seed=seed)
    return found


def _write(path: Path, scored: Sequence[Scored]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(("photo", "kind", "score"))
        writer.writerows((one.test.file, one.test.kind, f"{one.score:.6f}") for one in scored)


def _draw(path: Path, model: PatchModel, scored: Sequence[Scored], bank: int) -> None:
    from experiments.figures.patches import Panel, save_panels

    shown = scored[:_DRAWN]
    high = float(max(one.heat.max() for one in shown))
    low = float(min(one.heat.min() for one in shown))
    rows = []
    for one in shown:
        photo: Photo = model.photo(one.test.file)
        name = f"{one.test.kind}/{one.test.file.name}" if one.test.kind else one.test.file.name
        rows.append(
            [
                Panel(photo.pixels, name, outline=one.truth),
                Panel(photo.pixels, f"score {one.score:.3f}", heat=one.heat, heat_range=(low, high)),
            ]
        )
    known = ", green: the true anomaly" if any(one.truth is not None and one.truth.any() for one in shown) else ""
    title = f"The most anomalous of {len(scored):,} photos"
    save_panels(
        path, rows, title=title, note=f"{model.about}, a bank of {bank:,} patches; bright is far from it{known}"
    )


def _print(result: Mapping[str, Any], scored: Sequence[Scored], out: Path) -> None:
    print()
    for one in scored[:_PRINTED]:
        print(f"  {one.score:.4f}  {one.test.kind:16} {one.test.file}")
    for name, what in (("image_auroc", "image AUROC"), ("pixel_auroc", "pixel AUROC")):
        if name in result:
            low, high = result[name]["interval"]
            print(f"{what}: {result[name]['value']:.4f} ({low:.4f} – {high:.4f})")
    print(f"\n  {out / 'anomaly.png'}\n  {out / 'scores.csv'}")
