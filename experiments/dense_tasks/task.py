"""What a training of a dense head works on: pairs, classes, the backbone, and windows with features and targets."""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from dinojax.dense import VOID
from dinojax.errors import UserError
from dinojax.models.vit import VisionTransformer
from experiments.data.splits import Split
from experiments.dense_tasks.config import PATCHES, DenseConfig
from experiments.dense_tasks.pairs import PairFolder, Pairs, find_pairs
from experiments.dense_tasks.targets import Survey, TargetReader, read_table, survey
from experiments.dense_tasks.windows import (
    Features,
    Geometry,
    Window,
    cached_features,
    check_memory,
    window_split,
    windows_of,
)
from experiments.features.backbones import Backbone, is_random, load_backbone
from experiments.features.extractor import FeatureExtractor
from experiments.runs.settings import Dtype

Targets = UInt8[np.ndarray, "windows side side"] | Float32[np.ndarray, "windows side side"]
_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything that is known before features are computed.

    Attributes:
        config: the settings.
        folder: the pairs.
        surveys: of each split, what its targets hold.
        reader: of the targets.
        class_names: by class index; empty for depth.
        colours: of the classes.
        depth_range: metres of the first and the last bin; None for segmentation.
        backbone: the frozen model.
        geometry: of the windows.
    """

    config: DenseConfig
    folder: PairFolder
    surveys: Mapping[str, Survey]
    reader: TargetReader
    class_names: tuple[str, ...]
    colours: tuple[tuple[int, ...], ...]
    depth_range: tuple[float, float] | None
    backbone: Backbone
    geometry: Geometry

    @property
    def outputs(self) -> int:
        """Scores of a patch."""
        return len(self.class_names) if self.depth_range is None else self.config.head.bins

    @property
    def evaluated(self) -> list[str]:
        """The splits that the head is evaluated on."""
        return [name for name in self.folder.splits if name != "train"]

    def extractor(self, scale: float = 1.0) -> FeatureExtractor:
        """Computes features of the windows of a scale."""
        settings = self.config.model
        return window_extractor(
            self.backbone.model,
            self.geometry,
            scale,
            blocks=settings.blocks,
            normalisation=self.backbone.normalisation,
            dtype=settings.dtype,
            batch_size=settings.batch_size,
            cache_dir=self.config.run.cache_dir,
        )


@dataclasses.dataclass(frozen=True)
class WindowData:
    """The windows of a split, their features and their targets."""

    windows: list[Window]
    features: Features
    targets: Targets


def window_extractor(
    model: VisionTransformer, geometry: Geometry, scale: float, *, blocks: int, dtype: Dtype, **options: Any
) -> FeatureExtractor:
    """Computes the joined patches of the last `blocks` blocks of windows."""
    side = geometry.tile(scale) * geometry.patch
    return FeatureExtractor(model, image_size=side, blocks=blocks, maps=blocks, dtype=dtype, **options)


def make_task(config: DenseConfig) -> Task:
    """Finds and reads the pairs' targets, and loads the weights; no feature is computed.

    Raises:
        UserError: pairs, classes, weights or sizes that cannot be used.
    """
    data = config.data
    table = read_table(data.classes.expanduser()) if data.classes else None
    folder = find_pairs(
        data.folder,
        data.task,
        val_fraction=data.val_fraction,
        target_suffix=data.target_suffix,
        max_train=data.max_train,
        max_val=data.max_val,
        seed=config.run.seed,
    )
    reader = TargetReader(data.task, table, data.void, data.depth_scale, data.max_depth)
    backbone = load_backbone(config.model.weights, seed=config.run.seed, cache_dir=config.run.cache_dir)
    geometry = _geometry(config, backbone)
    surveys = {name: survey(pairs, reader) for name, pairs in folder.splits.items()}
    depth_range, names = None, ()
    if data.task == "depth":
        depth_range = data.min_depth, data.max_depth or surveys["train"].deepest
        if depth_range[1] <= depth_range[0]:
            raise UserError(
                f"the training depths reach {surveys['train'].deepest:g} m, not above --min-depth {data.min_depth:g}; "
                f"--depth-scale {data.depth_scale:g} says how many numbers of an image are a metre"
            )
    else:
        names = table.names if table else _indices(surveys)
    colours = _colours(len(names)) if table is None or table.colours is None else table.colours.tolist()
    return Task(config, folder, surveys, reader, names, tuple(map(tuple, colours)), depth_range, backbone, geometry)


def _geometry(config: DenseConfig, backbone: Backbone) -> Geometry:
    settings, patch = config.model, backbone.model.config.patch_size
    if settings.blocks > backbone.model.config.depth:
        raise UserError(
            f"--blocks {settings.blocks} is more than the {backbone.model.config.depth} blocks of {settings.weights}"
        )
    size = settings.image_size or max(settings.window or 0, PATCHES * patch)
    window = settings.window or min(size, PATCHES * patch)
    for name, side in (("image_size", size), ("window", window)):
        if side < patch:
            raise UserError(f"--{name.replace('_', '-')} {side} is smaller than one patch; take a multiple of {patch}")
    return Geometry(size, window, settings.overlap, patch, backbone.model.preprocessing.interpolation)


def _indices(surveys: Mapping[str, Survey]) -> tuple[str, ...]:
    """Names of the classes of masks without a table: their indices."""
    pixels = sum(one.pixels for one in surveys.values())[:VOID]
    if np.count_nonzero(pixels) < 2:
        raise UserError(
            f"the masks hold {np.count_nonzero(pixels)} classes, where two or more are needed"
            + (f": every pixel is {int(pixels.argmax())}" if pixels.any() else "")
        )
    return tuple(f"class {index}" for index in range(int(np.flatnonzero(pixels)[-1]) + 1))


def _colours(count: int) -> list[list[int]]:
    from experiments.figures.dense import palette

    return palette(count).tolist()


def introduce(task: Task) -> None:
    """Says what will be done; flushed, because the output may go to a file."""
    folder, geometry, config = task.folder, task.geometry, task.config
    notes = [*folder.notes]
    if task.depth_range is None:
        absent = [name for name, count in zip(task.class_names, task.surveys["train"].pixels) if not count]
        for name, one in task.surveys.items():
            valid = one.pixels[:VOID].sum()
            if not valid:
                raise UserError(
                    f"no {name} mask has a pixel that counts; --void {config.data.void} marks those that do not"
                )
        if absent:
            notes.append(f"no training mask holds {', '.join(absent[:5])}{' …' if len(absent) > 5 else ''}")
    for note in notes:
        print(f"note: {note}")
    counts = ", ".join(f"{len(pairs):,} {name}" for name, pairs in folder.splits.items())
    what = (
        f"{len(task.class_names)} classes" if task.depth_range is None else "{:g} to {:g} m".format(*task.depth_range)
    )
    print(
        f"{folder.name}: {counts} images with {'masks' if task.depth_range is None else 'depth maps'}, {what}\n"
        f"{config.model.weights}: shorter side {geometry.image_size} px, windows of "
        f"{geometry.tile() * geometry.patch} px with {geometry.tile()}×{geometry.tile()} patches, on "
        f"{jax.devices()[0].device_kind}",
        flush=True,
    )
    if is_random(config.model.weights):
        print("UNTRAINED: these weights are random; the numbers show what the architecture alone gives", flush=True)


def window_data(task: Task) -> dict[str, WindowData]:
    """Features and targets of the windows of every split, at the size of training.

    Raises:
        UserError: they would not fit the memory, a photo cannot be read, or features that are not finite.
    """
    extractor, geometry = task.extractor(), task.geometry
    windows = {
        name: windows_of(one.sizes, geometry, mirror=task.config.head.mirror and name == "train")
        for name, one in task.surveys.items()
    }
    side = geometry.tile() * geometry.patch
    numbers = extractor.grid**2 * extractor.shape[1] * task.config.model.blocks
    check_memory(sum(map(len, windows.values())), numbers, side**2, 1 if task.depth_range is None else 4)
    found = {}
    for name, pairs in task.folder.splits.items():
        split = window_split(pairs.photos, windows[name], geometry)
        features = cached_features(extractor, split, task.config.model.blocks)
        targets = window_targets(pairs, windows[name], task.surveys[name], geometry, task.reader)
        found[name] = WindowData(windows[name], features, targets)
    return found


def window_targets(
    pairs: Pairs, windows: list[Window], known: Survey, geometry: Geometry, reader: TargetReader
) -> Targets:
    """The targets of windows, resized to the nearest pixel."""
    side, patch = geometry.tile() * geometry.patch, geometry.patch
    found = np.empty((len(windows), side, side), np.uint8 if reader.task == "segmentation" else np.float32)
    by_photo: dict[int, list[int]] = {}
    for index, window in enumerate(windows):
        by_photo.setdefault(window.photo, []).append(index)

    def fill(photo: int) -> None:
        size = known.sizes[photo]
        rows, columns = geometry.grid(size)
        target = Image.fromarray(reader.read(pairs.targets.files[photo], size))
        resized = np.asarray(target.resize((columns * patch, rows * patch), Image.Resampling.NEAREST))
        for index in by_photo[photo]:
            window = windows[index]
            cut = resized[window.top * patch :, window.left * patch :][:side, :side]
            found[index] = cut[:, ::-1] if window.mirrored else cut

    with ThreadPoolExecutor(_THREADS, "targets") as pool:
        list(pool.map(fill, by_photo))
    return found


def scaled_features(task: Task, photos: Split, name: str, scale: float) -> tuple[list[Window], Features]:
    """The windows of a split at another scale, and their features."""
    windows = windows_of(task.surveys[name].sizes, task.geometry, scale)
    split = window_split(photos, windows, task.geometry, scale)
    return windows, cached_features(task.extractor(scale), split, task.config.model.blocks)
