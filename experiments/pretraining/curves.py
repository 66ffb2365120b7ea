"""The figure of a pretraining run: loss, schedules and health by epoch, from its log."""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import BLUE, GREEN, INK, MUTED, ORANGE, RED, save_figure, style

Records = Sequence[Mapping[str, Any]]


def save_training_curves(path: Path, log_records: Records, prototypes: int, *, title: str) -> None:
    """Draws six panels by epoch.

    Args:
        path: of the PNG.
        log_records: the lines of metrics.jsonl.
        prototypes: K; log K is the loss of uniform outputs.
        title: of the figure, one line.
    """
    steps = [record for record in log_records if "loss" in record]
    evaluated = [record for record in log_records if "knn_accuracy" in record]
    if not steps:
        return
    figure = Figure(figsize=(13, 6.6), layout="constrained", facecolor="white")
    panels = figure.subplots(2, 3)
    _lines(panels[0, 0], steps, {"loss": BLUE, "teacher_entropy": ORANGE, "kl": GREEN}, "nats")
    panels[0, 0].axhline(log(prototypes), color=MUTED, lw=1, ls=":", label="log K (uniform)")
    panels[0, 0].legend(frameon=False, fontsize=8, labelcolor=INK)
    _pair(panels[0, 1], steps, "learning_rate", "weight_decay")
    _pair(panels[0, 2], steps, "teacher_momentum", "teacher_temp")
    _pair(panels[1, 0], steps, "gradient_norm", "clipped_share")
    _pair(panels[1, 1], steps, "feature_std", "center_norm")
    if evaluated:
        percent = [{**record, "knn_accuracy": 100 * record["knn_accuracy"]} for record in evaluated]
        _pair(panels[1, 2], percent, "knn_accuracy", "rank_me", marker="o")
        panels[1, 2].set_ylabel("k-NN on training images (%)", color=BLUE)
    else:
        panels[1, 2].set_axis_off()
    figure.suptitle(title, fontsize=12, color=INK, x=0.01, ha="left")
    save_figure(figure, path)


def _lines(axes: Axes, records: Records, colors: Mapping[str, str], unit: str) -> None:
    for name, color in colors.items():
        axes.plot([r["epoch"] for r in records], [r[name] for r in records], color=color, label=_words(name), lw=1.4)
    style(axes, "epoch", unit)


def _pair(axes: Axes, records: Records, left: str, right: str, marker: str | None = None) -> None:
    """Two quantities of different units, each with an axis in its own colour."""
    epochs = [record["epoch"] for record in records]
    axes.plot(epochs, [record[left] for record in records], color=BLUE, lw=1.4, marker=marker, ms=3)
    style(axes, "epoch", _words(left))
    axes.yaxis.label.set_color(BLUE)
    other = axes.twinx()
    other.plot(epochs, [record[right] for record in records], color=RED, lw=1.4, marker=marker, ms=3)
    style(other, "epoch", _words(right))
    other.grid(visible=False)
    other.yaxis.label.set_color(RED)
    other.spines["right"].set_visible(True)
    other.spines["left"].set_visible(False)


def _words(name: str) -> str:
    return {"kl": "KL", "rank_me": "RankMe"}.get(name, name.replace("_", " "))
