"""A trained dense head on new photos of any size: masks or depth maps, photo by photo, in bounded memory."""

import csv
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dinojax.documents import whole_file
from dinojax.errors import UserError
from dinojax.images.decode import decode_rgb
from experiments.data.files import own_names, readable_images, readable_name, split_of_paths
from experiments.dense_tasks.head_file import HeadFile
from experiments.dense_tasks.photos import blended, predicted
from experiments.dense_tasks.run import reduced
from experiments.dense_tasks.targets import DepthMap, Mask
from experiments.dense_tasks.task import window_extractor
from experiments.dense_tasks.windows import Geometry, streamed_features, window_split, windows_of
from experiments.features.backbones import Backbone, is_random, load_backbone, short_name
from experiments.features.extractor import FeatureExtractor, Forecast
from experiments.figures.dense import Legend, Panel, overlay, save_panels
from experiments.runs import records

PREDICTIONS = "predictions.csv"
_OVERLAY = 1600  # px of the longer side
_SHOWN, _DRAWN = 320, 6


@dataclasses.dataclass(frozen=True)
class Inference:
    """How photos go through a head.

    Attributes:
        head: a trained one.
        backbone: its frozen model.
        geometry: of the windows.
        scales: of the photos, whose predictions are averaged.
        batch_size: windows per pass; None takes what suits the device.
        cache_dir: of the settings; no features are cached.
    """

    head: HeadFile
    backbone: Backbone
    geometry: Geometry
    scales: tuple[float, ...]
    batch_size: int | None = None
    cache_dir: Path | None = None

    @property
    def legend(self) -> Legend:
        """How the predictions are drawn."""
        return Legend(self.head.class_names, self.head.colours, self.head.depth_range)

    def extractors(self) -> list[FeatureExtractor]:
        """One for each scale."""
        known = self.head.backbone
        options = {"batch_size": self.batch_size, "cache_dir": self.cache_dir, "normalisation": known["normalisation"]}
        return [
            window_extractor(
                self.backbone.model, self.geometry, scale, blocks=self.head.blocks, dtype=known["dtype"], **options
            )
            for scale in self.scales
        ]

    def photo(self, extractors: Sequence[FeatureExtractor], file: Path, size: tuple[int, int]) -> Mask | DepthMap:
        """The class or the depth of each pixel of a photo of `size` (height, width)."""
        split, grids = split_of_paths(file.parent, "new", [file], np.zeros(1, np.int64)), []
        for extractor, scale in zip(extractors, self.scales):
            windows = windows_of([size], self.geometry, scale)
            tiles = window_split(split, windows, self.geometry, scale)
            name = readable_name(file.name)
            bar = tqdm(desc=name, total=len(windows), unit="window", dynamic_ncols=True, leave=False, delay=2)
            with bar:
                forecast = Forecast(bar, len(windows), "fewer --scales")
                parts = streamed_features(extractor, tiles, self.head.blocks, forecast)
                grids += blended(self.head, windows, parts, [size], self.geometry, scale)
        return predicted(self.head, grids, size)


def prepare_inference(
    head: HeadFile,
    *,
    weights: str | None,
    image_size: int | None,
    scales: tuple[float, ...] | None,
    overlap: float | None,
    batch_size: int | None,
    cache_dir: Path | None,
) -> Inference:
    """The backbone of a head, and the geometry with what the user changes of it.

    Raises:
        UserError: weights that are not the head's backbone, or a size that is smaller than a window.
    """
    known = head.backbone
    given = weights or known["weights"]
    backbone = load_backbone(given, seed=known["seed"], cache_dir=cache_dir)
    geometry = dataclasses.replace(
        head.geometry,
        image_size=image_size or head.geometry.image_size,
        overlap=head.geometry.overlap if overlap is None else overlap,
    )
    if image_size is not None and image_size < geometry.patch:
        raise UserError(f"--image-size {image_size} is smaller than one patch of {geometry.patch} px; take more")
    inference = Inference(head, backbone, geometry, scales or head.scales, batch_size, cache_dir)
    found = inference.extractors()[0].fingerprint
    if found != known["fingerprint"]:
        raise UserError(
            f"--weights {given} is not the backbone of the run: its parameters have changed since (fingerprint "
            f"{found[:12]}, the run has {known['fingerprint'][:12]}); pass the unchanged backbone as --weights, or "
            "repeat the run"
        )
    return inference


def predict_photos(inference: Inference, images: Path, out: Path, settings: Mapping[str, Any]) -> dict[str, Path]:
    """Writes the prediction of each photo, an overlay, and a table; returns the predictions' files by photo.

    Raises:
        UserError: no readable photo, or a folder that cannot be written.
    """
    sizes = readable_images([images])
    root = images if images.is_dir() else images.parent
    suffix = "_mask.png" if inference.head.task == "segmentation" else "_depth.npy"
    names, found = dict(zip(sizes, own_names(sizes))), {}
    extractors = inference.extractors()
    with records.run_folder(out) as partial:
        rows, panels = [], []
        for file, size in tqdm(sizes.items(), "photos", unit="img", dynamic_ncols=True, disable=len(sizes) == 1):
            values = inference.photo(extractors, file, size)
            _write(partial / f"{names[file]}{suffix}", values, inference.head)
            photo = reduced(decode_rgb(file, str(file)), _OVERLAY)
            shown = reduced(values, _OVERLAY)
            Image.fromarray(overlay(photo, shown, inference.legend)).save(partial / f"{names[file]}_overlay.png")
            if len(panels) < _DRAWN:
                pixels, small = reduced(photo, _SHOWN), reduced(values, _SHOWN)
                panels.append(Panel(readable_name(file.name), "", pixels, None, small))
            rows += _rows(readable_name(file.relative_to(root)), values, inference.head)
            found[readable_name(file.relative_to(root))] = out / f"{names[file]}{suffix}"
        _write_csv(partial / PREDICTIONS, rows, inference.head)
        records.write_json(partial / records.CONFIG_FILE, settings)
    weights = inference.head.backbone["weights"]
    untrained = " (UNTRAINED BASELINE)" if is_random(weights) else ""
    with records.run_folder(out) as partial:
        title = f"{short_name(weights)}{untrained}, {inference.geometry.image_size} px"
        save_panels(partial / "predictions.png", panels, inference.legend, title=title)
    for path in list(found.values())[:_DRAWN]:
        print(f"  {path}   {path.with_name(path.name.replace(suffix, '_overlay.png')).name}")
    if len(found) > _DRAWN:
        print(f"  … and {len(found) - _DRAWN:,} more")
    print(f"  {out / PREDICTIONS}\n  {out / 'predictions.png'}", flush=True)
    return found


def _write(path: Path, values: Mask | DepthMap, head: HeadFile) -> None:
    """A mask as PNG of indices, whose palette has the classes' colours; metres as .npy."""
    with whole_file(path) as file:
        if head.task == "depth":
            np.save(file, values, allow_pickle=False)
            return
        image = Image.fromarray(values)
        image.putpalette([value for colour in head.colours for value in colour])
        image.save(file, "PNG")


def _rows(name: str, values: Mask | DepthMap, head: HeadFile) -> Iterator[tuple[str, ...]]:
    if head.task == "depth":
        yield (name, *(f"{number:.4f}" for number in (values.min(), np.median(values), values.max())))
        return
    counts = np.bincount(values.ravel(), minlength=len(head.class_names))
    for label, count in zip(head.class_names, counts):
        if count:
            yield name, label, f"{count / values.size:.6f}"


def _write_csv(path: Path, rows: Sequence[tuple[str, ...]], head: HeadFile) -> None:
    heading = (
        ("file", "class", "share") if head.task == "segmentation" else ("file", "least_m", "median_m", "largest_m")
    )
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file).writerows([heading, *rows])
