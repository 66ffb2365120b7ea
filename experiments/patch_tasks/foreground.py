"""How likely each patch of a photo is foreground: by a principal component, or by a probe that a few masks teach.

    python -m experiments.patches foreground dinov2_vits14 path/to/photos
    python -m experiments.patches foreground dinov2_vits14 path/to/photos --masks path/to/masks

Without masks, the score is the first principal component of the patches of all photos together, scaled to 0-1; its sign
is chosen to be low along the borders. With --masks, a folder of images that are not 0 in the foreground and have the
stems of some of the photos, it is the probability by a logistic regression on their patches. Of each photo with a mask,
the IoU is printed by a probe that was trained on the other masks; with --method pca by the component.

The output folder gets foreground.png, each photo with its score; NAME.png, the score at the size of the photo, 0 to
255; scores.csv; and config.json.
"""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from dinojax.errors import UserError
from experiments.patch_tasks.images import PhotoFiles, mask_beside, photo_files, read_mask, resized_mask
from experiments.patch_tasks.model import Kind, PatchBackbone, PatchModel, Photo
from experiments.runs.settings import POSITIVE, PROBABILITY, Flags, RunSettings, check_bounds, flat

_DRAWN = 24  # photos
Score = Any  # float "rows columns"


@dataclasses.dataclass(frozen=True)
class ForegroundSettings:
    """How the score is computed."""

    masks: Path | None = None
    """Folder of masks that teach the probe, with the stems of their photos. None takes the principal component."""
    method: Literal["auto", "pca", "probe"] = "auto"
    """What the score is: the first principal component, or the probability by a linear probe. auto takes the probe
    where there are masks."""
    features: Kind = "tokens"
    """Features of the patches: the tokens after the final norm, or the keys of the last attention."""
    C: Annotated[float, POSITIVE] = 1.0
    """Inverse strength of the probe's penalty."""
    threshold: Annotated[float, PROBABILITY] = 0.5
    """Score above which a patch counts as foreground."""
    flip: bool = False
    """Whether to take the other side of the principal component."""


@dataclasses.dataclass(frozen=True)
class ForegroundConfig:
    """A foreground score of every patch."""

    model: Flags[PatchBackbone]
    files: Flags[PhotoFiles]
    foreground: Flags[ForegroundSettings] = ForegroundSettings()
    run: Flags[RunSettings] = RunSettings()


def run_foreground(config: ForegroundConfig) -> dict[str, float | None]:
    """Scores every photo; returns the IoU with the mask by name, None where there is no mask.

    Raises:
        UserError: photos, masks, weights or settings that cannot be used.
    """
    from experiments.data.files import own_names
    from experiments.runs import records

    check_bounds(config)
    settings, files = config.foreground, photo_files(config.files.photos)
    by_probe = settings.method == "probe" or (settings.method == "auto" and settings.masks is not None)
    masks = _masks(settings, files, by_probe)
    model = PatchModel(config.model, seed=config.run.seed, cache_dir=config.run.cache_dir)
    out = config.run.out or records.default_run_folder("patches-foreground")
    with records.run_folder(out) as folder:
        photos = [model.photo(file) for file in files]
        model.note_size(photos[0], f"{len(photos):,} photos")
        features = [model.features(photo, settings.features) for photo in photos]
        grids = {
            index: _on_patches(read_mask(file, photos[index].size), photos[index], model.patch_size)
            for index, file in masks.items()
        }
        scores, judged = _by_probe(features, grids, settings.C) if by_probe else _by_pca(features, settings.flip)
        names = own_names(files)
        overlap = [_iou(judged.get(i), grids.get(i), settings.threshold) for i in range(len(files))]
        _write(folder, names, photos, scores, overlap, settings.threshold)
        records.write_json(folder / records.CONFIG_FILE, flat(config))
        what = "probability by a linear probe" if by_probe else "first principal component"
        _draw(folder / "foreground.png", names, photos, scores, f"{model.about}; {what}", settings.threshold)
    _print(names, overlap, out)
    return dict(zip(names, overlap))


def _masks(settings: ForegroundSettings, files: Sequence[Path], by_probe: bool) -> dict[int, Path]:
    """The mask files by the index of their photos."""
    if settings.masks is None:
        if by_probe:
            raise UserError("--method probe needs masks to learn from; name their folder with --masks")
        return {}
    folder = settings.masks.expanduser()
    if not folder.is_dir():
        raise UserError(f"--masks {settings.masks} is not a folder; name a folder of mask images")
    found = {index: mask_beside(folder, file) for index, file in enumerate(files)}
    masks = {index: file for index, file in found.items() if file is not None}
    if not masks:
        raise UserError(f"--masks {settings.masks} holds no file with the stem of a photo, such as {files[0].stem}.png")
    return masks


def _on_patches(mask: Any, photo: Photo, patch_size: int) -> Any:
    from dinojax.patches import patch_shares

    return patch_shares(resized_mask(mask, photo.pixels.shape[:2]), patch_size) >= 0.5


def _by_pca(features: Sequence[Any], flip: bool) -> tuple[list[Score], dict[int, Score]]:
    from dinojax.maps import foreground_scores

    scores = foreground_scores(features, flip=flip)
    return scores, dict(enumerate(scores))


def _by_probe(features: Sequence[Any], grids: Mapping[int, Any], C: float) -> tuple[list[Score], dict[int, Score]]:  # noqa: N803
    """The score of every photo, and that of each photo with a mask by a probe that has not seen it."""
    from tqdm import tqdm

    from dinojax.patches import fit_foreground, foreground_probability

    def probe(indices):
        return fit_foreground([features[i] for i in indices], [grids[i] for i in indices], C=C)

    whole, judged = probe(grids), {}
    if len(grids) > 1:
        for left_out in tqdm(grids, desc="probes", unit="mask", dynamic_ncols=True, delay=1):
            others = probe([index for index in grids if index != left_out])
            judged[left_out] = foreground_probability(others, features[left_out])
    return [foreground_probability(whole, one) for one in features], judged


def _iou(score: Score | None, inside: Any, threshold: float) -> float | None:
    from dinojax.patches import region_similarity

    return None if score is None or inside is None else region_similarity(score > threshold, inside)


def _write(
    folder: Path,
    names: Sequence[str],
    photos: Sequence[Photo],
    scores: Sequence[Score],
    overlap: Sequence[float | None],
    threshold: float,
) -> None:
    from PIL import Image

    with (folder / "scores.csv").open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(("photo", "foreground_share", "iou"))
        for photo, score, iou in zip(photos, scores, overlap):
            share = f"{(score > threshold).mean():.4f}"
            writer.writerow((photo.file, share, "" if iou is None else f"{iou:.4f}"))
    for name, photo, score in zip(names, photos, scores):
        image = Image.fromarray(np.rint(255 * score).astype(np.uint8))
        image.resize(photo.size[::-1], Image.Resampling.BILINEAR).save(folder / f"{name}.png")


def _draw(
    path: Path,
    names: Sequence[str],
    photos: Sequence[Photo],
    scores: Sequence[Score],
    note: str,
    threshold: float,
) -> None:
    from experiments.figures.patches import Panel, save_panels

    rows = []
    for name, photo, score in list(zip(names, photos, scores))[:_DRAWN]:
        share = f"{100 * (score > threshold).mean():.0f} % foreground"
        rows.append(
            [
                Panel(photo.pixels, name),
                Panel(photo.pixels, "score", heat=score, heat_range=(0, 1)),
                Panel(photo.pixels, share, mask=score > threshold),
            ]
        )
    save_panels(path, rows, title="Foreground score of the patches", note=f"{note}, threshold {threshold:g}")


def _print(names: Sequence[str], overlap: Sequence[float | None], out: Path) -> None:
    known = [(name, iou) for name, iou in zip(names, overlap) if iou is not None]
    for name, iou in known[:20]:
        print(f"  {name:40} IoU {iou:.3f}")
    if known:
        print(f"mean IoU of {len(known):,} photos with masks: {np.mean([iou for _, iou in known]):.3f}")
    print(f"\n  {out / 'foreground.png'}\n  {out / 'scores.csv'}\n  {out}/NAME.png")
