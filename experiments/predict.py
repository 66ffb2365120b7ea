"""Classes, masks or depth of photos, with what a run of cifar10_probe, finetune_folder or dense saved, or published.

    python -m experiments.predict cat.jpg --run runs/cifar10_probe/20250101-120000
    python -m experiments.predict path/to/images --run RUN_DIR --classifiers linear,knn
    python -m experiments.predict photo.jpg --run runs/dense/20250101-120000 --image-size 1024
    python -m experiments.predict path/to/images --weights dinov2_vits14_lc
    python -m experiments.predict path/to/images --weights dinov2_vits14 --head nyu-dpt

Nothing is trained. With --run, the backbone must be the one of the run, down to its last parameter. A folder is
searched at any depth; its files that are not readable images are named and left out. The output folder gets
predictions.csv, predictions.png with the first 12 images, and config.json.

With a run of `dinojax dense`, each photo gets NAME_mask.png, class indices with the classes' colours as palette, or
NAME_depth.npy in metres, at the photo's own size, and NAME_overlay.png. A photo that is larger than the head's windows
is cut into overlapping ones, whose scores are blended; memory does not grow with their number.

A published depth head writes NAME_depth.npy (metres) and NAME_depth.png (16 bits) of each photo at its own size,
depth.png with the first 12 photos, and config.json with the units of the PNG files.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from experiments.features.backbones import is_random, load_backbone, short_name
from experiments.published.command import PublishedSettings
from experiments.runs.command_line import command_line
from experiments.runs.kinds import Kind, kind_of
from experiments.runs.settings import (
    BELOW_ONE,
    POSITIVE,
    UNIMPORTANT,
    BatchSettings,
    Flags,
    FolderSettings,
    check_bounds,
    flat,
)

if TYPE_CHECKING:
    from experiments.data.splits import Split
    from experiments.features.parts import FeatureParts
    from experiments.probing.classifiers import Prediction

_DRAWN = 12
_PRINTED = 40


@dataclasses.dataclass(frozen=True)
class RunBackbone(BatchSettings):
    """The backbone of the run."""

    weights: str | None = None
    """Present place of the backbone of --run; None takes the place that the run has recorded. Without --run, a
    published classifier such as dinov2_vits14_lc, or the model under --head."""


@dataclasses.dataclass(frozen=True)
class DenseInference:
    """How photos go through a head of `dinojax dense`. Classifiers of runs take none of these."""

    image_size: Annotated[int | None, POSITIVE] = None
    """Pixels that the shorter side of each photo is resized to. None takes the size of the run. A larger one shows
    smaller things, in more windows. Published classifiers take the centre of this side, None is 224; published depth
    heads resize to it, None keeps photos below 480 px and resizes larger ones to that."""
    scales: tuple[float, ...] | None = None
    """Sizes of the photos as multiples of --image-size, whose predictions are averaged. None takes those of the run."""
    overlap: Annotated[float | None, BELOW_ONE] = None
    """Least share of a window that the next one covers too. None takes that of the run."""


@dataclasses.dataclass(frozen=True)
class PredictionFolders(FolderSettings):
    """The folders that are written to."""

    out: Annotated[Path | None, UNIMPORTANT] = None
    """Output folder. None takes RUN/predictions/<date-time>, and runs/predict/<date-time> without --run."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Classes, probabilities or depth of images."""

    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """An image file (JPEG, PNG, WebP and others), or a folder of them."""
    run: Path | None = None
    """Run folder of `dinojax probe`, `dinojax finetune` or `dinojax dense`, or the folder of one mode of the second.
    None takes a published head."""
    classifiers: str = "all"
    """Comma-separated classifiers that the run has saved, such as linear,knn, or all of them."""
    model: Flags[RunBackbone] = RunBackbone()
    dense: Flags[DenseInference] = DenseInference()
    published: Flags[PublishedSettings] = PublishedSettings()
    output: Flags[PredictionFolders] = PredictionFolders()


def run(config: Config) -> dict[str, Any]:
    """Classifies the readable images, in the order of their names; returns the predictions of each classifier.

    With a run of `dinojax dense`, it writes a mask or a depth map of each, and returns their files by photo. A
    published depth head returns least and largest depth of each.

    Raises:
        UserError: images, a run, a classifier or a head that does not exist, or a backbone that is not the run's.
    """
    check_bounds(config)
    if config.run is None:
        return _predict_published(config)
    given = [name for name, value in vars(config.published).items() if value is not None]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} is for published heads; leave --run out, or leave it out")
    if kind_of(config.run.expanduser()) is Kind.DENSE:
        return dict(_dense(config))
    return _predict_with_run(config, config.run)


def _predict_published(config: Config) -> dict[str, Any]:
    from dinojax.heads import Classifier
    from experiments.data.files import readable_images
    from experiments.published import command
    from experiments.runs import records

    weights, path = config.model.weights, config.image.expanduser()
    if not command.is_published(weights, config.published):
        raise UserError(
            "nothing says what to predict: name a run of yours (--run RUN_DIR), a published classifier (--weights "
            "dinov2_vits14_lc), or a published head (--weights dinov2_vits14 --head nyu-dpt)"
        )
    for name in ("scales", "overlap"):
        if getattr(config.dense, name) is not None:
            raise UserError(f"--{name} is for runs of `dinojax dense`, and no --run was given")
    files = list(readable_images([path]))
    model = command.load_model(weights, config.published, config.output.cache_dir)
    out = config.output.out or records.default_run_folder("predict")
    if isinstance(model, Classifier):
        root = path if path.is_dir() else path.parent
        return command.predict_classes(model, files, root, out, flat(config), config.model.batch_size)
    return command.predict_depth(model, files, out, flat(config))


def _predict_with_run(config: Config, run_folder: Path) -> dict[str, "Prediction"]:
    from dinojax.parallel import make_mesh
    from experiments.probing.classifiers import load_classifiers, read_index, run_with_classifiers
    from experiments.runs import records

    for name, value in flat(config.dense).items():
        if value is not None:
            raise UserError(f"--{name.replace('_', '-')} is for runs of `dinojax dense`, which {config.run} is not")
    folder = run_with_classifiers(run_folder.expanduser())
    index = read_index(folder)
    if "normalisation" not in index:
        raise UserError(
            f"{folder}/classifiers.json was written by an earlier version, without the normalisation; repeat that run"
        )
    names = None if config.classifiers == "all" else [name.strip() for name in config.classifiers.split(",")]
    classifiers = load_classifiers(folder, names)
    split = _images(config.image.expanduser())
    out = config.output.out or folder / "predictions" / time.strftime("%Y%m%d-%H%M%S")
    with records.run_folder(out) as partial:
        features = _features(config, index, split)
        mesh = make_mesh(config.model.mesh)
        found = {classifier.name: classifier.predict(features, mesh) for classifier in classifiers}
        _write_csv(partial / "predictions.csv", split, found, index["class_names"])
        records.write_json(partial / records.CONFIG_FILE, flat(config))
    _print(split, found, index)
    with records.run_folder(out) as partial:
        _draw(partial / "predictions.png", split, found, index)
    for file in ("predictions.csv", "predictions.png"):
        print(f"  {out / file}")
    return found


def _dense(config: Config) -> dict[str, Path]:
    """Masks or depth maps of the photos."""
    from experiments.dense_tasks.config import check_scales
    from experiments.dense_tasks.head_file import load_head
    from experiments.dense_tasks.prediction import predict_photos, prepare_inference

    if config.classifiers != "all":
        raise UserError(
            f"--classifiers {config.classifiers}: a run of `dinojax dense` holds one head and no classifiers"
        )
    if config.dense.scales is not None:
        check_scales(config.dense.scales)
    folder = config.run.expanduser()
    inference = prepare_inference(
        load_head(folder),
        weights=config.model.weights,
        batch_size=config.model.batch_size,
        cache_dir=config.output.cache_dir,
        **flat(config.dense),
    )
    out = config.output.out or folder / "predictions" / time.strftime("%Y%m%d-%H%M%S")
    return predict_photos(inference, config.image.expanduser(), out, flat(config))


def _images(path: Path) -> "Split":
    """One image, or the readable ones of a folder."""
    from experiments.data.files import readable_images, split_of_paths

    files, root = list(readable_images([path])), path if path.is_dir() else path.parent
    return split_of_paths(root, "new", files, np.zeros(len(files), np.int64))


def _features(config: Config, index: Mapping[str, Any], split: "Split") -> "FeatureParts":
    """Features of the images, computed as in the run."""
    from dinojax.parallel import make_mesh
    from experiments.features.extractor import FeatureExtractor

    weights, cache_dir = config.model.weights or index["weights"], config.output.cache_dir
    backbone = load_backbone(weights, seed=index["seed"], cache_dir=cache_dir)
    extractor = FeatureExtractor(
        backbone.model,
        normalisation=index["normalisation"],
        image_size=index["image_size"],
        dtype=index["dtype"],
        batch_size=config.model.batch_size,
        cache_dir=cache_dir,
        mesh=make_mesh(config.model.mesh),
    )
    if extractor.fingerprint != index["weights_fingerprint"]:
        raise UserError(
            f"--weights {weights} is not the backbone of {config.run}: its parameters have changed since "
            f"(fingerprint {extractor.fingerprint[:12]}, the run has {index['weights_fingerprint'][:12]}); "
            "pass the unchanged backbone as --weights, or repeat the run"
        )
    if "interpolation" in index:  # of finetune_folder, which resizes to more than it crops
        from experiments.data.squares import centre_cropped

        split = centre_cropped(split, index["resize"], index["image_size"], interpolation=index["interpolation"])
    return extractor.extract([split])[0]


def _write_csv(path: Path, split: "Split", found: Mapping[str, "Prediction"], class_names: Sequence[str]) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "classifier", "class", "probability"))
        for i, name in enumerate(split.ids):
            for classifier, prediction in found.items():
                shown = f"{prediction.confidence[i]:.6f}" if prediction.are_probabilities else ""
                writer.writerow((name, classifier, class_names[prediction.classes[i]], shown))


def _draw(path: Path, split: "Split", found: Mapping[str, "Prediction"], index: Mapping[str, Any]) -> None:
    """Draws the first images with the class that each classifier predicts."""
    from experiments.figures.results import save_classified
    from experiments.probing.classifiers import FINETUNED, TITLES

    class_names, titles = index["class_names"], TITLES | {FINETUNED: "fine-tuned"}
    drawn = range(min(_DRAWN, len(split)))
    labelled = [
        [(titles[name], class_names[p.classes[i]], float(p.confidence[i])) for name, p in found.items()] for i in drawn
    ]
    title = f"{short_name(index['weights'])}{_untrained(index)}, {index['image_size']} px"
    save_classified(path, [split.read(i) for i in drawn], [split.ids[i] for i in drawn], labelled, title=title)


def _print(split: "Split", found: Mapping[str, "Prediction"], index: Mapping[str, Any]) -> None:
    """Prints a table with a row for each image and a column for each classifier. An SVC gives no probability."""
    class_names, shown = index["class_names"], range(min(_PRINTED, len(split)))
    width = min(40, max(len("file"), *(len(split.ids[i]) for i in shown)))
    columns = {}
    for name, prediction in found.items():
        percent = [f" {100 * p:.0f} %" if p == p else "" for p in prediction.confidence]
        columns[name] = [f"{class_names[prediction.classes[i]]}{percent[i]}" for i in shown]
    widths = {name: max(len(name), *map(len, cells)) + 2 for name, cells in columns.items()}
    print(f"\n{short_name(index['weights'])}{_untrained(index)}, {index['image_size']} px")
    print("  ".join(["file".ljust(width), *(name.ljust(widths[name]) for name in columns)]).rstrip())
    for i in shown:
        name = split.ids[i] if len(split.ids[i]) <= width else f"…{split.ids[i][1 - width :]}"
        print("  ".join([name.ljust(width), *(columns[key][i].ljust(widths[key]) for key in columns)]).rstrip())
    if len(split) > _PRINTED:
        print(f"… and {len(split) - _PRINTED:,} more in predictions.csv")
    print(flush=True)


def _untrained(index: Mapping[str, Any]) -> str:
    return " (UNTRAINED BASELINE)" if is_random(index["weights"]) else ""


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(command_line(Config, "experiments.predict", __doc__, args))


if __name__ == "__main__":
    main()
