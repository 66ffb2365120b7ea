"""Classifies images with the classifiers that a run of cifar10_probe or finetune_folder has saved.

    python -m experiments.predict cat.jpg --run runs/cifar10_probe/20250101-120000
    python -m experiments.predict path/to/images --run RUN_DIR --classifiers linear,knn

Nothing is trained. The backbone must be the one of the run, down to its last parameter. A folder is searched at any
depth; its files that are not readable images are named and left out. The output folder gets predictions.csv,
predictions.png with the first 12 images, and config.json.
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
from experiments.runs.command_line import command_line
from experiments.runs.settings import UNIMPORTANT, BatchSettings, Flags, FolderSettings, check_bounds, flat

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
    """Present place of the backbone. None takes the place that the run has recorded."""


@dataclasses.dataclass(frozen=True)
class PredictionFolders(FolderSettings):
    """The folders that are written to."""

    out: Annotated[Path | None, UNIMPORTANT] = None
    """Output folder. None takes RUN/predictions/<date-time>."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Classes and probabilities of images."""

    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """An image file (JPEG, PNG, WebP and others), or a folder of them."""
    run: Path
    """Run folder of `dinojax probe` or `dinojax finetune`, or the folder of one mode of the latter."""
    classifiers: str = "all"
    """Comma-separated classifiers that the run has saved, such as linear,knn, or all of them."""
    model: Flags[RunBackbone] = RunBackbone()
    output: Flags[PredictionFolders] = PredictionFolders()


def run(config: Config) -> dict[str, "Prediction"]:
    """Classifies the readable images, in the order of their names; returns the predictions of each classifier.

    Raises:
        UserError: images, a run or a classifier that does not exist, or a backbone that is not the run's.
    """
    from experiments.probing.classifiers import load_classifiers, read_index, run_with_classifiers
    from experiments.runs import records

    check_bounds(config)
    folder = run_with_classifiers(config.run.expanduser())
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
        found = {classifier.name: classifier.predict(features) for classifier in classifiers}
        _write_csv(partial / "predictions.csv", split, found, index["class_names"])
        records.write_json(partial / records.CONFIG_FILE, flat(config))
    _print(split, found, index)
    with records.run_folder(out) as partial:
        _draw(partial / "predictions.png", split, found, index)
    for file in ("predictions.csv", "predictions.png"):
        print(f"  {out / file}")
    return found


def _images(path: Path) -> "Split":
    """One image, or the readable ones of a folder."""
    from experiments.data.files import readable_images, split_of_paths

    files, root = list(readable_images([path])), path if path.is_dir() else path.parent
    return split_of_paths(root, "new", files, np.zeros(len(files), np.int64))


def _features(config: Config, index: Mapping[str, Any], split: "Split") -> "FeatureParts":
    """Features of the images, computed as in the run."""
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
