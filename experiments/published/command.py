"""What `predict` does without a run: it takes a published classifier or depth head."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from dinojax.errors import UserError
from experiments.runs.settings import POSITIVE

_DRAWN = 12
_PRINTED = 40


@dataclasses.dataclass(frozen=True)
class PublishedSettings:
    """A published head instead of a run."""

    head: (
        Literal[
            "imagenet-linear",
            "imagenet-linear4",
            "nyu-linear",
            "nyu-linear4",
            "nyu-dpt",
            "kitti-linear",
            "kitti-linear4",
            "kitti-dpt",
        ]
        | None
    ) = None
    """Published head on the model that --weights names: imagenet heads classify, nyu and kitti heads estimate depth
    indoors and on roads. dinov2_vits14_lc as --weights stands for dinov2_vits14 with imagenet-linear4."""
    backbone_weights: Path | None = None
    """File or folder with the weights of the model, instead of the download."""
    head_weights: Path | None = None
    """File with the weights of the head, instead of the download."""
    max_depth: Annotated[float | None, POSITIVE] = None
    """Largest depth in metres. None takes 10 for nyu and 80 for kitti heads; torch.hub's linear NYU heads have 80."""


def is_published(weights: str | None, settings: PublishedSettings) -> bool:
    """Whether these settings ask for a published head."""
    return settings.head is not None or (weights is not None and weights.endswith("_lc"))


def load_model(weights: str | None, settings: PublishedSettings, cache_dir: Path | None) -> Any:
    """The classifier or depth estimator that the settings name.

    Raises:
        UserError: no such head was published, or it cannot be loaded.
    """
    from converters import load_pretrained  # here, because it loads torch when a PyTorch file is read

    if weights is None:
        raise UserError(f"--head {settings.head} goes on a model; name it, such as --weights dinov2_vits14")
    return load_pretrained(
        weights,
        head=settings.head,  # type: ignore[call-overload]  # one of several kinds
        weights=settings.backbone_weights,
        head_weights=settings.head_weights,
        max_depth=settings.max_depth,
        cache_dir=cache_dir,
    )


def predict_classes(
    model: Any, files: Sequence[Path], root: Path, out: Path, settings: Mapping[str, Any], batch_size: int | None
) -> dict[str, Any]:
    """Prints, writes and draws the classes of images; returns the prediction under the name of the head."""
    from experiments.data.files import split_of_paths
    from experiments.figures.results import save_classified
    from experiments.published import classes
    from experiments.runs import records

    split = split_of_paths(root, "new", files, np.zeros(len(files), np.int64))
    size = settings["image_size"] or model.preprocessing.image_size
    with records.run_folder(out) as partial:
        found = classes.classify(model, split, size=size, batch_size=batch_size)
        classes.write_csv(partial / "predictions.csv", split, found, model.class_names)
        records.write_json(partial / records.CONFIG_FILE, settings)
    told = classes.lines(split, found, model.class_names, _PRINTED)
    print("\n".join(["", f"{settings['weights']}, {size} px", *told]))
    if len(split) > _PRINTED:
        print(f"… and {len(split) - _PRINTED:,} more in predictions.csv")
    drawn = range(min(_DRAWN, len(split)))
    bars = [
        [
            (str(rank), classes.first_name(model.class_names[index]), float(found.scores[row, index]))
            for rank, index in enumerate(classes.best(found.scores[row]), start=1)
        ]
        for row in drawn
    ]
    with records.run_folder(out) as partial:
        title = f"{settings['weights']}, {size} px"
        images, names = [split.read(row) for row in drawn], [split.ids[row] for row in drawn]
        save_classified(partial / "predictions.png", images, names, bars, title=title)
    print(*(f"  {out / name}" for name in ("predictions.csv", "predictions.png")), sep="\n")
    return {"published": found}


def predict_depth(model: Any, files: Sequence[Path], out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Writes and draws the depth of images; returns the range of each in metres, by the name of its files."""
    from tqdm import tqdm

    from experiments.figures.maps import save_depth
    from experiments.published import depth
    from experiments.runs import records

    units, names = depth.units_per_metre(model.head.config.max_depth), depth.own_names(files)
    about = f"{settings['weights']}, {settings['head']}"
    ranges, drawn = {}, []
    with records.run_folder(out) as partial:
        maps = depth.depth_maps(model, files, image_size=settings["image_size"])
        for name, found in zip(names, tqdm(maps, total=len(files), desc="model", unit="img", dynamic_ncols=True)):
            depth.write_depth(partial, name, found.depth, units)
            ranges[name] = (float(found.depth.min()), float(found.depth.max()))
            if len(drawn) < _DRAWN:
                drawn.append((found.pixels, found.depth))
        records.write_json(partial / records.CONFIG_FILE, {**settings, "png_units_per_metre": units})
    with records.run_folder(out) as partial:
        pictures, metres = zip(*drawn)
        save_depth(partial / "depth.png", pictures, metres, names[:_DRAWN], title="Depth in metres", note=about)
    print(f"\n{about}")
    for name, (least, most) in list(ranges.items())[:_PRINTED]:
        print(f"{name}  {least:.2f} to {most:.2f} m")
    print(
        f"  {out}/NAME_depth.npy in metres, NAME_depth.png with {units} units a metre, depth.png with all of the first"
    )
    return ranges
