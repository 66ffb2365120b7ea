"""The results of a supervised training: metrics, predictions, figures, the tuned model, and the table of all modes."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.special import softmax

import dinojax
from dinojax.documents import write_whole
from dinojax.finetune import MODES, ImageClassifier
from experiments.features.fingerprints import fingerprint
from experiments.features.run_folders import TUNED_MODEL
from experiments.figures.results import save_confusion
from experiments.figures.style import BLUE, GREEN, INK, ORANGE, RED, bound_percent, save_figure, set_title, style
from experiments.finetuning.config import FinetuneConfig
from experiments.finetuning.data import Task
from experiments.probing.classifiers import FINETUNED, Classifier, Prediction, save_classifiers
from experiments.probing.metrics import compute_metrics, write_predictions
from experiments.runs import records
from experiments.runs.log import read_log

PREDICTIONS, CONFUSION, CURVES = "predictions.csv", "confusion.png", "curves.png"
_COLORS = dict(zip(MODES, (BLUE, ORANGE, GREEN, RED)))


class BestEpoch(NamedTuple):
    """The epoch of a training that is kept.

    Attributes:
        epoch: its number, from 1.
        trainable: number of parameters that were trained.
        parameters: number of parameters of the classifier.
        peak_mib: peak memory of the device; on a CPU, of the process above what it held before.
        logits: of the evaluated splits, by name.
    """

    epoch: int
    trainable: int
    parameters: int
    peak_mib: float | None
    logits: Mapping[str, Float[np.ndarray, "_images classes"]]


def finish(
    folder: Path, config: FinetuneConfig, task: Task, tuned: ImageClassifier, best: BestEpoch, dtype: str
) -> None:
    """Writes everything about one mode; metrics.json marks it as finished. Figures are drawn by `report`."""
    names, log = task.images.class_names, read_log(folder)
    splits, predictions, metrics = task.evaluated, {}, {}
    for split in splits:
        predictions[split.name] = _prediction(best.logits[split.name])
        metrics[split.name] = compute_metrics(split.labels, predictions[split.name], names, seed=config.run.seed)
    write_predictions(folder / PREDICTIONS, [(split, predictions[split.name]) for split in splits], names)
    _save_model(folder, config, task, tuned, dtype)
    seconds = [record["seconds"] for record in log]
    document = {
        "mode": config.training.mode,
        "protocol": config.training.protocol,
        "data": {
            "name": task.images.name,
            "classes": len(names),
            **{f"{split.name}_images": len(split) for split in (task.images.train, *splits)},
            **{f"{split.name}_fingerprint": split.fingerprint for split in (task.images.train, *splits)},
            "notes": task.images.notes,
        },
        "weights": config.model.weights,
        "image_size": task.image_size,
        "trainable_parameters": best.trainable,
        "parameters": best.parameters,
        "best_epoch": best.epoch,
        "epochs": len(log),
        "selected_by": f"validation {config.training.select}",
        **metrics,
        "bias": None if task.images.test else _BIAS,
        "seconds_an_epoch": {"median": float(np.median(seconds)), "first": seconds[0], "all": float(np.sum(seconds))},
        "peak_memory_mib": best.peak_mib,
        "dtype": dtype,
        "environment": records.environment(),
    }
    records.write_json(folder / records.METRICS_FILE, document)


def report(out: Path) -> dict[str, dict[str, Any]]:
    """Writes metrics.json and the table of every mode that is finished, then figures; returns the metrics by mode."""
    finished = {mode: out / mode for mode in MODES if (out / mode / records.METRICS_FILE).is_file()}
    found = {mode: records.read_json(folder / records.METRICS_FILE) for mode, folder in finished.items()}
    write_whole(out / records.METRICS_FILE, (json.dumps(found, indent=2) + "\n").encode())  # nothing relies on it
    text = table(found)
    write_whole(out / "results.md", f"{text}\n".encode())
    print(f"\n{text}\n", flush=True)
    if any(one["bias"] for one in found.values()):
        print(f"note: {_BIAS}")
    for mode, folder in finished.items():
        if not (folder / CONFUSION).is_file():
            _draw_confusion(folder, found[mode])
    _save_curves(out / CURVES, {mode: read_log(folder) for mode, folder in finished.items()}, found)
    for folder in finished.values():
        print(f"  {folder}   python -m experiments.predict IMAGES --run {folder}")
    print("\n".join(f"  {out / name}" for name in ("results.md", CURVES, records.METRICS_FILE)))
    return found


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table with one line per mode: accuracies in per cent, time, memory and parameters."""
    split = "test" if any("test" in one for one in found.values()) else "validation"
    columns = ("mode", f"{split} accuracy", "95 % interval", "balanced accuracy", "lowest recall", "best epoch")
    columns += ("s per epoch", "MiB", "trainable parameters")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for mode, one in found.items():
        metrics = one.get(split, one["validation"])
        low, high = (100 * end for end in metrics["interval"]["accuracy"])
        recalls = {name: recall for name, recall in metrics["per_class_accuracy"].items() if recall is not None}
        lowest = min(recalls, key=recalls.get)
        memory = one["peak_memory_mib"]
        lines.append(
            f"| {mode} | {100 * metrics['accuracy']:.2f} | {low:.1f} – {high:.1f} | "
            f"{100 * metrics['balanced_accuracy']:.2f} | {100 * recalls[lowest]:.1f} ({lowest}) | "
            f"{one['best_epoch']} of {one['epochs']} | {one['seconds_an_epoch']['median']:.1f} | "
            f"{'–' if memory is None else f'{memory:.0f}'} | {one['trainable_parameters']:,} |"
        )
    return "\n".join(lines)


_BIAS = (
    "there is no third split: the best epoch was chosen on the images that it is evaluated on, which flatters it; a "
    "folder test/ beside the other two would be evaluated once, at the end"
)


def _prediction(logits: Float[np.ndarray, "images classes"]) -> Prediction:
    return Prediction(logits.argmax(axis=1), softmax(logits.astype(np.float64), axis=1))


def _save_model(folder: Path, config: FinetuneConfig, task: Task, tuned: ImageClassifier, dtype: str) -> None:
    """Saves the backbone, if it changed, and the head as a classifier that `experiments.predict` reads."""
    weights = task.backbone.weights
    if config.training.mode != "linear":
        source = {
            "method": f"{config.training.mode} by dinojax from {config.model.weights}",
            "data": task.images.name,
            "images": len(task.images.train),
            "seed": config.run.seed,
        }
        tuned.backbone.preprocessing = dataclasses.replace(tuned.backbone.preprocessing, image_size=task.image_size)
        weights = str(dinojax.save(tuned.backbone, folder / TUNED_MODEL, source=source))
    path = Path(weights).expanduser()
    head = {"kernel": np.asarray(tuned.head.kernel[...]), "bias": np.asarray(tuned.head.bias[...])}
    settings = {"kind": "linear", "classes": len(task.images.class_names), "blocks": 1, "mean_patch": False}
    description = {
        "weights": str(path.resolve()) if path.exists() else weights,
        "weights_fingerprint": fingerprint(tuned.backbone),
        "normalisation": task.backbone.normalisation,
        "seed": config.run.seed,
        "image_size": task.image_size,
        "resize": task.resize,
        "interpolation": config.views.interpolation,
        "dtype": dtype,
        "class_names": list(task.images.class_names),
        "protocol": config.training.protocol,
    }
    save_classifiers(folder, [Classifier(FINETUNED, head, settings)], description)


def _draw_confusion(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Draws the confusion matrix of the test images, or of the validation images where there are no others."""
    split = "test" if "test" in metrics else "validation"
    numbers, data = metrics[split], metrics["data"]
    names = list(numbers["per_class_accuracy"])
    title = (
        f"{data['name']}, {metrics['mode']}: {100 * numbers['accuracy']:.1f} % of {numbers['images']:,} {split} images "
        f"correct (balanced: {100 * numbers['balanced_accuracy']:.1f} %)"
    )
    save_confusion(folder / CONFUSION, np.array(numbers["confusion"]), names, title=title)


def _save_curves(path: Path, logs: Mapping[str, list], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws loss and accuracy of every mode by epoch: training dashed, validation solid, the kept epoch marked."""
    figure = Figure(figsize=(12.5, 4.4), layout="constrained", facecolor="white")
    for axes, name, factor, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), (1, 100), ("cross-entropy (nats)", "accuracy (%)")
    ):
        for mode, log in logs.items():
            color, epochs = _COLORS[mode], [record["epoch"] for record in log]
            validation = [factor * record[f"validation_{name}"] for record in log]
            axes.plot(epochs, [factor * record[f"train_{name}"] for record in log], color=color, lw=1.2, ls="--")
            axes.plot(epochs, validation, color=color, lw=1.8, label=mode if name == "loss" else None)
            best = found[mode]["best_epoch"]
            axes.plot(best, validation[best - 1], color=color, marker="o", ms=7, mec="white")
        style(axes, "epoch", label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    bound_percent(axes, "y")
    axes.plot([], [], color=INK, lw=1.8, label="validation")
    axes.plot([], [], color=INK, lw=1.2, ls="--", label="training (during the epoch)")
    axes.plot([], [], color=INK, marker="o", ls="", label="epoch kept")
    figure.legend(loc="outside right center", frameon=False, fontsize=9, labelcolor=INK)
    data = next(iter(found.values()))["data"]
    title = f"{data['name']}: {data['train_images']:,} training and {data['validation_images']:,} validation images"
    set_title(figure, title)
    save_figure(figure, path)
