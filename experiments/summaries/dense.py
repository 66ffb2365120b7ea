"""Tables of dense heads grouped by everything but their seed: mean and deviation of each score."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.dense_tasks.config import DenseConfig
from experiments.runs.records import RESULT_FILE, read_json
from experiments.runs.settings import unimportant
from experiments.summaries.evaluations import cell, markdown

_NOT_COMPARED = unimportant(DenseConfig) | {"seed", "folder"}
_SCORES = {
    "segmentation": ("mean_iou", "pixel_accuracy", "mean_accuracy"),
    "depth": ("rmse", "abs_rel", "delta1"),
}
_TITLES = {"mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy",
           "rmse": "RMSE (m)", "abs_rel": "AbsRel", "delta1": "δ1"}  # fmt: skip
_NOTE = (
    "Per cent, and metres: mean ± standard deviation (number of seeds). The epoch was selected on the validation "
    "images, so numbers on those are optimistic."
)


def read_dense(path: Path) -> list[dict[str, Any]]:
    """The results of all dense heads in a folder and below.

    Raises:
        UserError: a damaged file.
    """
    found = [read_json(file) for file in sorted(path.expanduser().rglob(RESULT_FILE))]
    return [result for result in found if result.get("command") == "dense"]


def dense_heads(results: Iterable[Mapping[str, Any]]) -> str:
    """A table for each task, with a line for each set of runs that differ in their seed alone; "" without runs."""
    tasks: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}  # by settings and seed
    for result in results:
        settings = {name: value for name, value in result["config"].items() if name not in _NOT_COMPARED}
        counts = {name: value for name, value in result["data"].items() if name.endswith("_images")}
        key = json.dumps([result["data"]["name"], settings, counts], sort_keys=True)
        tasks.setdefault(result["task"], {}).setdefault(key, {})[result["config"]["seed"]] = result
    if not tasks:
        return ""
    parts = [_table(task, [list(seeds.values()) for seeds in groups.values()]) for task, groups in tasks.items()]
    return "## Dense heads\n\n" + "\n\n".join(parts) + f"\n\n{_NOTE}"


def _table(task: str, groups: list[list[Mapping[str, Any]]]) -> str:
    """The lines of one task. If there are several, each names the settings in which they differ."""
    configs = [runs[0]["config"] for runs in groups]
    names = [name for name in configs[0] if name not in _NOT_COMPARED | {"weights", "image_size"}]
    different = [name for name in names if len({str(one.get(name)) for one in configs}) > 1]
    header = ["data", "weights", *different, "evaluated on", *(_TITLES[name] for name in _SCORES[task])]
    lines = []
    for runs in groups:
        first = runs[0]
        split = "test" if "test" in first else "validation"
        own = [str(first["config"].get(name)) for name in different]
        about = [first["data"]["name"], f"{Path(first['weights']).name}, {first['image_size']} px", *own]
        scores = [_cell(name, [run[split].get(name) for run in runs]) for name in _SCORES[task]]
        lines.append([*about, f"{first['data'][f'{split}_images']:,} {split}", *scores])
    return f"### {task.capitalize()}\n\n{markdown(header, lines)}"


def _cell(name: str, values: list[float | None]) -> str:
    known = np.array([value for value in values if value is not None])
    if name != "rmse":
        return cell(known)
    if not len(known):
        return "–"
    return f"{known.mean():.3f}" + (f" ± {known.std(ddof=1):.3f}" if len(known) > 1 else "") + f" ({len(known)})"
