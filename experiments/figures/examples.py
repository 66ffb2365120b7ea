"""Learning curves, and example images with the predictions of a classifier."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.figures.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    RED,
    bound_percent,
    interpolation,
    save_figure,
    set_title,
    shorten,
    style,
)

_COLUMNS = 8
_COLUMN, _ROW, _HEADING, _TITLE = 1.6, 2.0, 0.36, 0.45  # inches
_TITLE_LETTERS = 115


def save_curves(
    path: Path,
    train: Mapping[str, Float[np.ndarray, " epochs"]],
    heldout: Mapping[str, Float[np.ndarray, " epochs"]],
    *,
    best_epoch: int,
    heldout_name: str,
    title: str,
) -> None:
    """Draws loss and accuracy by epoch on the training images and on those that select the epoch.

    Args:
        path: PNG file to write.
        train: "loss" (nats) and "accuracy" (fraction) on the training images after each epoch.
        heldout: the same on the images that select the epoch.
        best_epoch: index of the selected epoch.
        heldout_name: label of the images that select the epoch, such as "held-out training images".
        title: one line.
    """
    figure = Figure(figsize=(9.5, 4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2)
    for axes, name, factor, label in zip(
        panels, ("loss", "accuracy"), (1, 100), ("cross-entropy (nats)", "accuracy (%)")
    ):
        epochs = np.arange(1, len(train[name]) + 1)
        marker = "o" if len(epochs) <= 30 else None
        axes.plot(epochs, factor * train[name], color=BLUE, marker=marker, ms=4, label="training images")
        axes.plot(epochs, factor * heldout[name], color=ORANGE, marker=marker, ms=4, label=heldout_name)
        axes.axvline(best_epoch + 1, color=MUTED, lw=1, ls=":", label=f"selected: epoch {best_epoch + 1}")
        style(axes, "epoch", label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    bound_percent(panels[1], "y")
    panels[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    set_title(figure, title)
    save_figure(figure, path)


def save_predictions(
    path: Path,
    images: Sequence[UInt8[np.ndarray, "_h _w 3"]],
    labels: Int[np.ndarray, " images"],
    predicted: Int[np.ndarray, " images"],
    probabilities: Float[np.ndarray, " images"],
    class_names: Sequence[str],
    *,
    title: str,
) -> None:
    """Draws example images with their predictions: first the correct ones, then the wrong ones.

    Args:
        path: PNG file to write.
        images: RGB, of any sizes.
        labels: true classes.
        predicted: predicted classes.
        probabilities: of the predicted classes; NaN if there is none.
        class_names: by class index.
        title: one line.
    """
    groups = [
        ("correct", GREEN, np.flatnonzero(predicted == labels)),
        ("wrong", RED, np.flatnonzero(predicted != labels)),
    ]
    groups = [group for group in groups if len(group[2])]
    rows = [-(-len(indices) // _COLUMNS) for *_, indices in groups]
    heights = [_HEADING + _ROW * count for count in rows]
    figure = Figure(figsize=(_COLUMN * _COLUMNS, _TITLE + sum(heights)), facecolor="white")
    title = shorten(title, _TITLE_LETTERS)
    figure.text(0.01, 1 - 0.5 * _TITLE / figure.get_figheight(), title, fontsize=14, color=INK, va="center")
    top = figure.get_figheight() - _TITLE
    for (word, color, indices), height in zip(groups, heights):
        figure.text(
            0.01, (top - 0.5 * _HEADING) / figure.get_figheight(), word, fontsize=12, color=color, va="center",
            fontweight="bold",
        )  # fmt: skip
        for position, i in enumerate(indices):
            row, column = divmod(position, _COLUMNS)
            axes = _inches(figure, column * _COLUMN, top - _HEADING - row * _ROW)
            truth = "" if word == "correct" else f"truth: {shorten(class_names[labels[i]], 15)}"
            percent = "" if np.isnan(probabilities[i]) else f"{100 * probabilities[i]:.0f} %"
            _draw_example(axes, images[i], color, shorten(class_names[predicted[i]], 17), percent, truth)
        top -= height
    save_figure(figure, path)


def _inches(figure: Figure, left: float, top: float) -> Axes:
    """Square axes in the cell whose upper left corner is `left` and `top` inches from the lower left of the figure."""
    width, height = figure.get_size_inches()
    margin, side = 0.08, _COLUMN - 0.16
    axes = figure.add_axes(((left + margin) / width, (top - side) / height, side / width, side / height))
    axes.set_axis_off()
    return axes


def _draw_example(axes: Axes, pixels: np.ndarray, color: str, predicted: str, percent: str, truth: str) -> None:
    """Draws the framed centre square, the probability in its corner, and the prediction and the truth below it."""
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    square = pixels[top : top + side, left : left + side]
    axes.imshow(square, interpolation=interpolation(square))
    axes.add_patch(Rectangle((-0.5, -0.5), side, side, fill=False, ec=color, lw=2.5))
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
    badge = {"boxstyle": "square,pad=0.25", "fc": color, "ec": color}
    if percent:
        axes.annotate(percent, (1, 1), (-3, -3), **place, ha="right", fontsize=7.5, color="white", bbox=badge)
    axes.annotate(predicted, (0.5, 0), (0, -5), **place, ha="center", fontsize=9.5, color=color, fontweight="bold")
    axes.annotate(truth, (0.5, 0), (0, -19), **place, ha="center", fontsize=8.5, color=MUTED)
