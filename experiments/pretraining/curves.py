"""The figure of a pretraining run: loss, schedules and health by epoch, from its log."""

import itertools
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import BLUE, GREEN, INK, MUTED, ORANGE, RED, save_figure, style

Records = Sequence[Mapping[str, Any]]

# Of DINO, whose loss is the sum of the first two, and of DINOv2; those that the log holds are drawn.
_LOSSES = {"teacher_entropy": ORANGE, "kl": GREEN, "class_cross_entropy": BLUE, "class_entropy": ORANGE,
           "patch_cross_entropy": GREEN, "patch_entropy": RED}  # fmt: skip
_SCHEDULES = (("learning_rate", "weight_decay"), ("teacher_momentum", "teacher_temp"))
_HEALTH = (("gradient_norm", "clipped_share"), ("feature_std", "center_norm"),
           ("gradient_norm_backbone", "gradient_norm_dino_head"), ("koleo_loss", "masked_share"))  # fmt: skip
_COLUMNS, _WIDTH, _HEIGHT, _TOP = 3, 4.33, 3.1, 0.4  # inches
_WORDS = {"kl": "KL", "rank_me": "feature rank (RankMe)", "knn_accuracy": "k-NN on training images (%)"}


def save_training_curves(path: Path, log_records: Records, prototypes: int, *, title: str) -> None:
    """Writes the figure to a PNG file; see `draw_training_curves`."""
    if figure := draw_training_curves(log_records, prototypes, title=title):
        save_figure(figure, path)


def draw_training_curves(log_records: Records, prototypes: int, *, title: str) -> Figure | None:
    """Draws the loss, the schedules that are not constant, the health of the training and the evaluations, by epoch.

    Args:
        log_records: the lines of metrics.jsonl; without steps, there is no figure.
        prototypes: K; log K is the loss of uniform outputs.
        title: of the figure, one line.
    """
    steps = [record for record in log_records if "loss" in record]
    evaluated = [record for record in log_records if "rank_me" in record]
    if not steps:
        return None
    several = len(steps) > 1
    constant = [name for name in itertools.chain(*_SCHEDULES) if several and len({one[name] for one in steps}) == 1]
    schedules = [tuple(name for name in pair if name not in constant) for pair in _SCHEDULES]
    health = [pair for pair in _HEALTH if all(name in steps[0] for name in pair)]
    drawn = [(steps, pair) for pair in (*filter(None, schedules), *health)]
    if evaluated:
        measured = tuple(name for name in ("knn_accuracy", "rank_me") if name in evaluated[0])
        drawn.append(([_in_percent(record) for record in evaluated], measured))
    rows = -(-(1 + len(drawn)) // _COLUMNS)
    size = (_COLUMNS * _WIDTH, rows * _HEIGHT + _TOP)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    _draw_losses(panels[0], steps, prototypes)
    for panel, (records, names) in zip(panels[1:], drawn):
        _draw(panel, records, names)
    for panel in panels[1 + len(drawn) :]:
        panel.remove()
    held = ", ".join(f"{_words(name)} {steps[0][name]:g}" for name in constant)
    about = f"{title}\nconstant: {held}" if held else title
    figure.suptitle(about, fontsize=11, color=INK, x=0.01, ha="left")
    return figure


def _draw_losses(axes: Axes, records: Records, prototypes: int) -> None:
    losses = {"loss": BLUE, **_LOSSES} if "teacher_entropy" in records[0] else _LOSSES
    for name, color in losses.items():
        if name in records[0]:
            _line(axes, records, name, color, label=_words(name))
    axes.axhline(log(prototypes), color=MUTED, lw=1, ls=":", label="log K (uniform)")
    style(axes, "epoch", "nats")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _draw(axes: Axes, records: Records, names: Sequence[str]) -> None:
    """One quantity, or two of different units, each with an axis in its own colour."""
    style(axes, "epoch", "")
    for name, color, one in zip(names, (BLUE, RED), (axes, axes.twinx() if len(names) > 1 else None)):
        _line(one, records, name, color)
        style(one, "epoch", _words(name))
        one.yaxis.label.set_color(color)
        one.set_ylim(bottom=max(0.0, one.get_ylim()[0]))  # none of them is negative
        if one is not axes:
            one.grid(visible=False)
            one.spines["right"].set_visible(True)
            one.spines["left"].set_visible(False)


def _line(axes: Axes, records: Records, name: str, color: str, label: str | None = None) -> None:
    epochs, values = [record["epoch"] for record in records], [record[name] for record in records]
    marker = "o" if len(records) < 30 else None
    axes.plot(epochs, values, color=color, lw=1.4, marker=marker, ms=3, label=label)


def _in_percent(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: 100 * value if name == "knn_accuracy" else value for name, value in record.items()}


def _words(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))
