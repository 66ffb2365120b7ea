"""Tables of fine-tunings grouped by everything but their seed: mean and deviation of each mode."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinojax.finetune import MODES
from experiments.finetuning.config import FinetuneConfig
from experiments.runs.records import CONFIG_FILE, METRICS_FILE, read_json, with_new_names
from experiments.runs.settings import unimportant
from experiments.summaries.evaluations import cell, markdown

_NOT_COMPARED = unimportant(FinetuneConfig) | {"seed"}
_HEADER = ("mode", "evaluated on", "accuracy", "balanced accuracy", "trainable parameters", "s per epoch")
_NOTE = (
    "Per cent of the evaluated images: mean ± standard deviation (number of seeds). Seconds per epoch are the mean "
    "over runs of their medians. The epoch was selected on the validation images, so numbers on those are optimistic."
)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """One mode of one run.

    Attributes:
        title: data, weights and image size.
        settings: everything else that the runs of one line have in common.
        seed: of the run.
        metrics: the content of metrics.json.
    """

    title: str
    settings: dict[str, Any]
    seed: int
    metrics: dict[str, Any]

    @property
    def evaluated_on(self) -> str:
        """The last of the splits that were evaluated."""
        return "test" if "test" in self.metrics else "validation"


def read_tuned(path: Path) -> list[Tuned]:
    """All finished modes of fine-tuning runs in a folder and below.

    Raises:
        UserError: a damaged file.
    """
    return [one for file in sorted(path.expanduser().rglob(METRICS_FILE)) if (one := _read(file))]


def _read(file: Path) -> Tuned | None:
    if not (file.parent / CONFIG_FILE).is_file():
        return None  # the metrics of all modes together
    metrics = read_json(file)
    if metrics.get("mode") not in MODES:
        return None  # of another command
    config, data = read_json(file.parent / CONFIG_FILE), metrics["data"]
    settings = {name: value for name, value in with_new_names(config).items() if name not in _NOT_COMPARED}
    settings |= {name: value for name, value in data.items() if name.endswith("_images")}
    title = f"{data['name']} from {Path(metrics['weights']).name}, {metrics['image_size']} px"
    return Tuned(title, settings, config["seed"], metrics)


def finetunings(runs: Iterable[Tuned]) -> str:
    """A table for each data set, weights and size, with a line for each mode and its settings; "" without runs."""
    titles: dict[str, dict[str, dict[str, dict[int, Tuned]]]] = {}  # by mode, settings and seed
    for run in runs:
        lines = titles.setdefault(run.title, {}).setdefault(run.metrics["mode"], {})
        lines.setdefault(json.dumps(run.settings, sort_keys=True), {})[run.seed] = run
    if not titles:
        return ""
    parts = []
    for title, modes in titles.items():
        groups = [[list(seeds.values()) for seeds in modes[mode].values()] for mode in MODES if mode in modes]
        lines = [line for group in groups for line in _lines(group)]
        parts.append(f"### {title}\n\n{markdown(_HEADER, lines)}")
    return "## Fine-tuning\n\n" + "\n\n".join(parts) + f"\n\n{_NOTE}"


def _lines(groups: Sequence[Sequence[Tuned]]) -> list[list[str]]:
    """The lines of one mode. If there are several, each names the settings in which they differ."""
    settings = [runs[0].settings for runs in groups]
    different = [name for name in settings[0] if len({str(one.get(name)) for one in settings}) > 1]
    return [_line(runs, [f"{name} {runs[0].settings.get(name)}" for name in different]) for runs in groups]


def _line(runs: Sequence[Tuned], named: Sequence[str]) -> list[str]:
    first, split = runs[0].metrics, runs[0].evaluated_on
    numbers = [cell(np.array([run.metrics[split][name] for run in runs])) for name in ("accuracy", "balanced_accuracy")]
    seconds = np.mean([run.metrics["seconds_an_epoch"]["median"] for run in runs])
    images, parameters = first["data"][f"{split}_images"], first["trainable_parameters"]
    return [", ".join([first["mode"], *named]), f"{images:,} {split}", *numbers, f"{parameters:,}", f"{seconds:.1f}"]
