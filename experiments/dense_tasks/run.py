"""A training of a dense head from its settings to its run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.dense_tasks.config import DenseConfig, DenseResult
from experiments.dense_tasks.head_file import HEAD_FILE, save_head
from experiments.dense_tasks.task import Task, introduce, make_task, window_data
from experiments.dense_tasks.training import Evaluation, Trained, evaluate, selection, train_head
from experiments.features.backbones import is_random, short_name
from experiments.runs import records
from experiments.runs.kinds import DENSE_FILE
from experiments.runs.measure import measured
from experiments.runs.settings import flat, resolve_dtype

COMMAND = "dense"
CURVES, EXAMPLES, CLASSES = "curves.png", "examples.png", "classes.png"
_EXAMPLES = 6
_SHOWN = 320  # px of the longer side in figures
_BIAS = (
    "there are no test images: the best epoch was chosen on the images that it is evaluated on, which flatters it; a "
    "folder test/ would be evaluated once, at the end"
)


def train_dense(config: DenseConfig) -> DenseResult:
    """Trains a head, evaluates it on whole photos, and writes the run folder.

    Raises:
        UserError: pairs, weights or settings that cannot be used, or a loss that is not finite.
    """
    config.check()
    task = make_task(config)
    introduce(task)
    out = config.run.out or records.default_run_folder(COMMAND)
    with records.run_folder(out) as partial:
        data = window_data(task)
        with measured() as cost:
            trained = train_head(task, data["train"], data["validation"])
        found = {name: evaluate(task, trained.head, name, data[name], examples=_EXAMPLES) for name in task.evaluated}
        windows = {name: len(one.windows) for name, one in data.items()}
        document = _document(task, trained, found, windows, cost.seconds)
        save_head(partial, trained.head)
        records.write_json(partial / records.RESULT_FILE, document)
        records.write_json(partial / records.CONFIG_FILE, flat(config))
    _print(task, document)
    with records.run_folder(out) as partial:
        _draw(partial, task, document, found)
    for name in (records.RESULT_FILE, DENSE_FILE, HEAD_FILE, *_figures(task)):
        print(f"  {out / name}")
    print(f"  {out}   python -m experiments.predict IMAGES --run {out}", flush=True)
    return DenseResult(out, {name: document[name] for name in task.evaluated})


def _document(
    task: Task, trained: Trained, found: Mapping[str, Evaluation], windows: Mapping[str, int], seconds: float
) -> dict[str, Any]:
    config, splits = task.config, task.folder.splits
    return {
        "command": COMMAND,
        "task": config.data.task,
        "weights": task.backbone.weights,
        "data": {
            "name": task.folder.name,
            **{f"{name}_images": len(pairs) for name, pairs in splits.items()},
            **{f"{name}_windows": count for name, count in windows.items()},
            "identity": {name: pairs.identity for name, pairs in splits.items()},
        },
        "class_names": list(task.class_names),
        "depth_range": task.depth_range,
        "image_size": task.geometry.image_size,
        "window": task.geometry.tile() * task.geometry.patch,
        "feature_dtype": resolve_dtype(config.model.dtype),
        "selected_by": f"{selection(task)} on the validation windows",
        "best_epoch": trained.best_epoch,
        **{name: one.metrics for name, one in found.items()},
        "bias": None if "test" in found else _BIAS,
        "head_seconds": round(seconds, 2),
        "epochs": trained.epochs,
        "config": flat(config),
        "environment": records.environment(),
    }


def _print(task: Task, document: Mapping[str, Any]) -> None:
    seconds = np.median([one["seconds"] for one in document["epochs"]])
    print(
        f"\nepoch {document['best_epoch']} of {len(document['epochs'])} kept; {seconds:.2f} s per epoch (median), "
        f"{document['head_seconds']:.1f} s for all with their validation"
    )
    for name in task.evaluated:
        print("\n".join(_lines(name, document[name])))
    if document["bias"]:
        print(f"note: {document['bias']}")


def _lines(name: str, metrics: Mapping[str, Any]) -> list[str]:
    """Scores of one split as text."""
    if "mean_iou" in metrics:
        low, high = (100 * end for end in metrics["mean_iou_interval"])
        lines = [
            f"{name}, {metrics['images']:,} images: mean IoU {100 * metrics['mean_iou']:.1f} % "
            f"(95 % interval {low:.1f} – {high:.1f}), pixel accuracy {100 * metrics['pixel_accuracy']:.1f} %, "
            f"mean accuracy {100 * metrics['mean_accuracy']:.1f} %"
        ]
        shown = {key: "–" if value is None else f"{100 * value:.1f}" for key, value in metrics["class_iou"].items()}
        return lines + [f"  {key:24}{value:>6}" for key, value in list(shown.items())[:40]]
    if not metrics["measured_images"]:
        return [f"{name}, {metrics['images']:,} images: no pixel was measured"]
    parts = []
    for key, label, unit, factor in (
        ("rmse", "RMSE", "m", 1),
        ("abs_rel", "AbsRel", "%", 100),
        ("delta1", "δ1", "%", 100),
    ):
        low, high = (factor * end for end in metrics["interval"][key])
        parts.append(f"{label} {factor * metrics[key]:.3g} {unit} (95 % interval {low:.3g} – {high:.3g})")
    return [f"{name}, {metrics['measured_images']:,} images: {', '.join(parts)}"]


def _figures(task: Task) -> tuple[str, ...]:
    return (CURVES, EXAMPLES, CLASSES) if task.depth_range is None else (CURVES, EXAMPLES)


def _draw(folder: Path, task: Task, document: Mapping[str, Any], found: Mapping[str, Evaluation]) -> None:
    from experiments.figures.dense import Legend, Panel, save_class_bars, save_panels, save_training

    split = task.evaluated[-1]
    metrics, evaluation, photos = document[split], found[split], task.folder.splits[split].photos
    untrained = " (UNTRAINED BASELINE)" if is_random(task.backbone.weights) else ""
    about = f"{task.folder.name}, {short_name(task.backbone.weights)}{untrained}, {task.geometry.image_size} px"
    save_training(
        folder / CURVES, document["epochs"], selection(task), best_epoch=document["best_epoch"],
        title=f"{about}: {document['data']['train_images']:,} training images",
    )  # fmt: skip
    legend = Legend(task.class_names, task.colours, task.depth_range)
    word = "pixel accuracy" if task.depth_range is None else "δ1"
    panels = [
        Panel(
            photos.ids[one.photo],
            f"{word} {100 * one.score:.0f} %",
            reduced(photos.read(one.photo), _SHOWN),
            reduced(one.truth, _SHOWN),
            reduced(one.prediction, _SHOWN),
        )
        for one in evaluation.examples
    ]
    if panels:
        save_panels(folder / EXAMPLES, panels, legend, title=f"{about}: {split} images from the worst to the best")
    if task.depth_range is None:
        save_class_bars(
            folder / CLASSES, metrics["class_iou"], task.colours, mean=metrics["mean_iou"],
            interval=tuple(metrics["mean_iou_interval"]), title=f"{about}: {metrics['images']:,} {split} images",
        )  # fmt: skip


def reduced(values: np.ndarray, longest: int) -> np.ndarray:
    """An image, a mask or a depth map with its longer side at most `longest` px; only images are interpolated."""
    height, width = values.shape[:2]
    share = longest / max(height, width)
    if share >= 1:
        return values
    size = (max(1, round(width * share)), max(1, round(height * share)))
    filter = Image.Resampling.BOX if values.ndim == 3 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(values).resize(size, filter))
