"""What a supervised training leaves behind: metrics, predictions, figures, the tuned model; the table of all modes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.special import softmax

import dinojax
from dinojax.finetune import MODES
from dinojax.finetune import Classifier as TunedClassifier
from experiments.features.extractor import fingerprint
from experiments.figures.results import save_confusion
from experiments.figures.style import BLUE, GREEN, INK, ORANGE, RED, save_figure, style
from experiments.finetuning.config import FinetuneConfig
from experiments.finetuning.data import Task
from experiments.probing.classifiers import FINETUNED, Classifier, Prediction, save_classifiers
from experiments.probing.metrics import evaluate, write_predictions
from experiments.runs import records
from experiments.runs.log import read_log

MODEL, PREDICTIONS, CONFUSION, CURVES = "model", "predictions.csv", "confusion.png", "curves.png"
_COLORS = dict(zip(MODES, (BLUE, ORANGE, GREEN, RED)))


class Outcome(NamedTuple):
    """The best epoch of a training.

    Attributes:
        best_epoch: counted from one.
        trainable: how many numbers were trained.
        parameters: how many the classifier has.
        peak_mib: highest memory of the device; on a CPU, of the process above what it held before.
        logits: of the judged splits, by name.
    """

    best_epoch: int
    trainable: int
    parameters: int
    peak_mib: float | None
    logits: Mapping[str, Float[np.ndarray, "_images classes"]]


def finish(
    folder: Path, config: FinetuneConfig, task: Task, tuned: TunedClassifier, outcome: Outcome, dtype: str
) -> None:
    """Writes everything about one mode; metrics.json comes last and says that all the rest is there."""
    names, log = task.images.class_names, read_log(folder)
    predictions = {split.name: _prediction(outcome.logits[split.name]) for split in task.judged}
    judged = {split.name: _metrics(split.labels, predictions[split.name], names, config.seed) for split in task.judged}
    write_predictions(folder / PREDICTIONS, [(split, predictions[split.name]) for split in task.judged], names)
    last = task.judged[-1]  # the test images where there are some
    title = f"{task.images.name}, {config.mode}: {len(last):,} {last.name} images"
    save_confusion(folder / CONFUSION, np.array(judged[last.name]["confusion"]), names, title=title)
    _save_model(folder, config, task, tuned, dtype)
    seconds = [record["seconds"] for record in log]
    document = {
        "mode": config.mode,
        "protocol": config.protocol,
        "data": {
            "name": task.images.name,
            "classes": len(names),
            **{f"{split.name}_images": len(split) for split in (task.images.train, *task.judged)},
            **{f"{split.name}_fingerprint": split.fingerprint for split in (task.images.train, *task.judged)},
            "notes": task.images.notes,
        },
        "weights": config.weights,
        "image_size": task.image_size,
        "trainable_parameters": outcome.trainable,
        "parameters": outcome.parameters,
        "best_epoch": outcome.best_epoch,
        "epochs": len(log),
        "selected_by": f"validation {config.select}",
        **judged,
        "bias": None if task.images.test else _BIAS,
        "seconds_an_epoch": {"median": float(np.median(seconds)), "first": seconds[0], "all": float(np.sum(seconds))},
        "peak_memory_mib": outcome.peak_mib,
        "dtype": dtype,
        "environment": records.environment(),
    }
    records.write_json(folder / records.METRICS_FILE, document)


def report(out: Path) -> None:
    """The table and the curves of every mode that is finished in the run folder; also metrics.json with all of them."""
    finished = {mode: out / mode for mode in MODES if (out / mode / records.METRICS_FILE).is_file()}
    found = {mode: records.read_json(folder / records.METRICS_FILE) for mode, folder in finished.items()}
    _save_curves(out / CURVES, {mode: read_log(folder) for mode, folder in finished.items()}, found)
    records.write_json(out / records.METRICS_FILE, found)
    text = table(found)
    records.write_whole(out / "results.md", f"{text}\n".encode())
    print(f"\n{text}\n")
    if any(one["bias"] for one in found.values()):
        print(f"note: {_BIAS}")
    for folder in finished.values():
        print(f"  {folder}   python -m experiments.predict IMAGES --run {folder}")
    print("\n".join(f"  {out / name}" for name in ("results.md", CURVES, records.METRICS_FILE)))


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a mode, in Markdown: accuracies in per cent, time, memory and parameters."""
    split = "test" if any("test" in one for one in found.values()) else "validation"
    columns = ("mode", f"{split} accuracy", "95 % interval", "balanced accuracy", "least recall", "best epoch")
    columns += ("s an epoch", "MiB", "trainable parameters")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for mode, one in found.items():
        judged = one.get(split, one["validation"])
        low, high = (100 * end for end in judged["interval"]["accuracy"])
        recalls = {name: recall for name, recall in judged["per_class_accuracy"].items() if recall is not None}
        least = min(recalls, key=recalls.get)
        memory = one["peak_memory_mib"]
        lines.append(
            f"| {mode} | {100 * judged['accuracy']:.2f} | {low:.1f} – {high:.1f} | "
            f"{100 * judged['balanced_accuracy']:.2f} | {100 * recalls[least]:.1f} ({least}) | "
            f"{one['best_epoch']} of {one['epochs']} | {one['seconds_an_epoch']['median']:.1f} | "
            f"{'–' if memory is None else f'{memory:.0f}'} | {one['trainable_parameters']:,} |"
        )
    return "\n".join(lines)


_BIAS = (
    "there is no third split: the best epoch was chosen on the images that it is judged on, which flatters it; a test/ "
    "folder beside the other two would be judged once, at the end"
)


def _prediction(logits: Float[np.ndarray, "images classes"]) -> Prediction:
    return Prediction(logits.argmax(axis=1), softmax(logits.astype(np.float64), axis=1))


def _metrics(labels: np.ndarray, prediction: Prediction, names: tuple[str, ...], seed: int) -> dict[str, Any]:
    metrics = evaluate(labels, prediction, names, seed=seed)
    recalls = [recall for recall in metrics["per_class_accuracy"].values() if recall is not None]
    return {**metrics, "balanced_accuracy": float(np.mean(recalls))}


def _save_model(folder: Path, config: FinetuneConfig, task: Task, tuned: TunedClassifier, dtype: str) -> None:
    """The backbone, where it changed, and the head as a classifier that `experiments.predict` reads."""
    weights = task.backbone.weights
    if config.mode != "linear":
        mean, std = task.backbone.normalisation
        source = {
            "method": f"{config.mode} by dinojax from {config.weights}",
            "data": task.images.name,
            "images": len(task.images.train),
            "seed": config.seed,
            "image_size": task.image_size,
            "mean": mean,
            "std": std,
        }
        weights = str(dinojax.save(tuned.backbone, folder / MODEL, source=source))
    path = Path(weights).expanduser()
    head = {"kernel": np.asarray(tuned.head.kernel[...]), "bias": np.asarray(tuned.head.bias[...])}
    settings = {"kind": "linear", "classes": len(task.images.class_names), "blocks": 1, "mean_patch": False}
    description = {
        "weights": str(path.resolve()) if path.exists() else config.weights,
        "weights_fingerprint": fingerprint(tuned.backbone),
        "normalisation": task.backbone.normalisation,
        "seed": config.seed,
        "image_size": task.image_size,
        "resize": task.resize,
        "interpolation": config.interpolation,
        "dtype": dtype,
        "class_names": list(task.images.class_names),
        "protocol": config.protocol,
    }
    save_classifiers(folder, [Classifier(FINETUNED, head, settings)], description)


def _save_curves(path: Path, logs: Mapping[str, list], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Loss and accuracy of every mode by epoch: training dashed, validation solid, the kept epoch marked."""
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
    axes.plot([], [], color=INK, lw=1.8, label="validation")
    axes.plot([], [], color=INK, lw=1.2, ls="--", label="training (while it learns)")
    axes.plot([], [], color=INK, marker="o", ls="", label="epoch that is kept")
    figure.legend(loc="outside right center", frameon=False, fontsize=9, labelcolor=INK)
    data = next(iter(found.values()))["data"]
    title = f"{data['name']}: {data['train_images']:,} training and {data['validation_images']:,} validation images"
    figure.suptitle(title, fontsize=12, color=INK, x=0.01, ha="left")
    save_figure(figure, path)
