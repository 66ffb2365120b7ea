"""Classifies images from anywhere with the classifiers that a run of cifar10_probe has saved.

    python -m experiments.predict cat.jpg --run runs/cifar10_probe/20250101-120000
    python -m experiments.predict path/to/images --run RUN_DIR --classifiers linear,knn

Nothing is fitted again. The backbone must be the one of the run, down to its last parameter. In a folder, which is
searched at any depth, files that are no readable images are named and left out. The output folder gets
predictions.csv, predictions.png with the first 12 images, and config.json.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from dinojax.commands import exit_on_user_error
from dinojax.errors import UserError
from experiments.features.backbones import is_random, load_backbone
from experiments.runs.settings import require_positive

if TYPE_CHECKING:
    from experiments.data.splits import Split
    from experiments.probing.classifiers import Prediction

_DRAWN = 12
_PRINTED = 40


@dataclasses.dataclass(frozen=True)
class Config:
    """Classes and probabilities of images; see the top of this file."""

    image: tyro.conf.Positional[Path]
    """A JPEG, PNG, WebP … or a folder of them."""
    run: Path
    """The folder that cifar10_probe wrote."""
    classifiers: str = "all"
    """"all" that the run has saved, or some of them, such as linear,knn."""
    weights: str | None = None
    """Where the backbone of the run is now, if it was moved."""
    batch_size: int | None = None
    """Images per forward pass. Default: what the cache of a CPU holds, 256 on a GPU or TPU."""
    out: Path | None = None
    """The folder to write to. Default: RUN/predictions/<date-time>."""
    cache_dir: Path = Path("~/.cache/dinojax")
    """Where features and downloaded weights are kept."""


def run(config: Config) -> dict[str, "Prediction"]:
    """Classifies the images; returns the predictions by classifier, for the readable images in order of their names.

    Raises:
        UserError: no images, no such run or classifier, or a backbone that is not the run's.
    """
    from experiments.figures.results import save_answers
    from experiments.probing.classifiers import FINETUNED, TITLES, load_classifiers, read_index
    from experiments.runs import records

    require_positive(config, ["batch_size"])
    folder = config.run.expanduser()
    index = read_index(folder)
    if "normalisation" not in index:
        raise UserError(
            f"{folder}/classifiers.json is of an earlier version, which kept no normalisation; repeat that run"
        )
    names = None if config.classifiers == "all" else [name.strip() for name in config.classifiers.split(",")]
    classifiers = load_classifiers(folder, names)
    split = _images(config.image.expanduser())
    out = config.out or folder / "predictions" / time.strftime("%Y%m%d-%H%M%S")
    with records.run_folder(out) as partial:
        features = _features(config, index, split)
        found = {classifier.name: classifier.predict(features) for classifier in classifiers}
        class_names, titles = index["class_names"], TITLES | {FINETUNED: "fine-tuned"}
        _write_csv(partial / "predictions.csv", split, found, class_names)
        drawn = range(min(_DRAWN, len(split)))
        answers = [
            [(titles[name], class_names[p.classes[i]], float(p.confidence[i])) for name, p in found.items()]
            for i in drawn
        ]
        title = f"{index['weights']}{_untrained(index)}, {index['image_size']} px"
        pictures = [split.read(i) for i in drawn]
        save_answers(partial / "predictions.png", pictures, [split.ids[i] for i in drawn], answers, title=title)
        records.write_json(partial / records.CONFIG_FILE, dataclasses.asdict(config))
    _print(split, found, index)
    for file in ("predictions.csv", "predictions.png"):
        print(f"  {out / file}")
    return found


def _images(path: Path) -> "Split":
    """One image, or the readable ones of a folder; what is left out is named."""
    from experiments.data.splits import SUFFIXES, Split, decode_rgb, digest

    if not path.exists():
        raise UserError(f"{path}: there is no such image or folder")
    files, root = [path], path.parent
    if path.is_dir():
        candidates = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        files, root = sorted(file for file in candidates if not file.name.startswith(".")), path
    readable, unreadable = [], []
    for file in files:
        try:
            decode_rgb(file, str(file))
            readable.append(file)
        except UserError as error:
            unreadable.append(error)
    if unreadable and not readable:
        raise unreadable[0]
    if not readable:
        raise UserError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
    for error in unreadable:
        print(f"left out: {error}")
    stamps = [f"{file.resolve()}\0{file.stat().st_size}\0{file.stat().st_mtime_ns}\n" for file in readable]
    return Split(
        "outside",
        [str(file.relative_to(root)) for file in readable],
        np.zeros(len(readable), np.int64),
        lambda i: decode_rgb(readable[i], str(readable[i])),
        digest(*stamps),
    )


def _features(config: Config, index: Mapping[str, Any], split: "Split") -> np.ndarray:
    """As the run made them, by the same backbone."""
    from experiments.features.extractor import FeatureExtractor

    weights, cache_dir = config.weights or index["weights"], config.cache_dir.expanduser()
    backbone = load_backbone(weights, seed=index["seed"], cache_dir=cache_dir)
    extractor = FeatureExtractor(
        backbone.model,
        normalisation=index["normalisation"],
        image_size=index["image_size"],
        dtype=index["dtype"],
        batch_size=config.batch_size,
        cache_dir=cache_dir,
    )
    if extractor.fingerprint != index["weights_fingerprint"]:
        raise UserError(
            f"--weights {weights} is not the backbone of {config.run}: its parameters have changed since "
            f"(fingerprint {extractor.fingerprint[:12]}, the run has {index['weights_fingerprint'][:12]}); "
            "pass the former as --weights, or repeat the run"
        )
    if "interpolation" in index:  # a model of finetune_folder, which resizes to more than it cuts out
        from experiments.data.squares import centre_cropped

        split = centre_cropped(split, index["resize"], index["image_size"], interpolation=index["interpolation"])
    return extractor.extract([split])[0]


def _write_csv(path: Path, split: "Split", found: Mapping[str, "Prediction"], class_names: Sequence[str]) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "classifier", "class", "probability"))
        for i, name in enumerate(split.ids):
            for classifier, prediction in found.items():
                shown = f"{prediction.confidence[i]:.6f}" if prediction.are_probabilities else ""
                writer.writerow((name, classifier, class_names[prediction.classes[i]], shown))


def _print(split: "Split", found: Mapping[str, "Prediction"], index: Mapping[str, Any]) -> None:
    """Images down, classifiers across; an SVC gives a class without a probability."""
    class_names, shown = index["class_names"], range(min(_PRINTED, len(split)))
    width = min(40, max(len("file"), *(len(split.ids[i]) for i in shown)))
    columns = {}
    for name, prediction in found.items():
        percent = [f" {100 * p:.0f} %" if p == p else "" for p in prediction.confidence]
        columns[name] = [f"{class_names[prediction.classes[i]]}{percent[i]}" for i in shown]
    widths = {name: max(len(name), *map(len, cells)) + 2 for name, cells in columns.items()}
    print(f"\n{index['weights']}{_untrained(index)}, {index['image_size']} px")
    print("  ".join(["file".ljust(width), *(name.ljust(widths[name]) for name in columns)]).rstrip())
    for i in shown:
        name = split.ids[i] if len(split.ids[i]) <= width else f"…{split.ids[i][1 - width :]}"
        print("  ".join([name.ljust(width), *(columns[key][i].ljust(widths[key]) for key in columns)]).rstrip())
    if len(split) > _PRINTED:
        print(f"… and {len(split) - _PRINTED:,} more in predictions.csv")
    print()


def _untrained(index: Mapping[str, Any]) -> str:
    return " (UNTRAINED BASELINE)" if is_random(index["weights"]) else ""


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    with exit_on_user_error():
        run(tyro.cli(Config, args=args, description=__doc__))


if __name__ == "__main__":
    main()
