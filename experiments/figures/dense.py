"""Figures of dense prediction: masks and depth over photos, IoU of classes, curves of a training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from matplotlib import colormaps
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.figures.style import (
    BLUE,
    GRID,
    INK,
    MUTED,
    ORANGE,
    bound_percent,
    interpolation,
    save_figure,
    set_title,
    shorten,
    shorten_middle,
    style,
)

_DEPTH_COLOURS = "viridis"
_OVERLAY = 0.55  # share of the mask's colour
_VOID_GREY = 235
_GOLDEN = 0.61803398875  # turns of hue between two classes: neighbours and next neighbours differ
_FIRST = (120, 120, 120)  # of class 0, which is often the background
_CELL, _ROW_GAP, _TOP = 2.5, 0.3, 0.62  # inches
_MOST_NAMED = 24  # classes in a legend
_CLASS_HEIGHT = 0.26  # inches

Pixels = UInt8[np.ndarray, "_height _width 3"]
Values = UInt8[np.ndarray, "_height _width"] | Float32[np.ndarray, "_height _width"]


class Panel(NamedTuple):
    """A photo with its name and score, the truth if it is known, and the prediction."""

    name: str
    score: str
    pixels: Pixels
    truth: Values | None
    prediction: Values


class Legend(NamedTuple):
    """How values are drawn: classes by name and colour, or depth by its range in metres."""

    names: Sequence[str]
    colours: Sequence[Sequence[int]]
    depth_range: tuple[float, float] | None


def palette(count: int) -> UInt8[np.ndarray, "{count} 3"]:
    """Colours of classes: grey for class 0, then hues a golden section apart, of three brightnesses in turn."""
    hues = (0.58 + _GOLDEN * np.arange(count)) % 1
    bright = np.array([0.95, 0.7, 0.82])[np.arange(count) % 3]
    colours = (255 * hsv_to_rgb(np.stack([hues, np.full(count, 0.75), bright], axis=-1))).astype(np.uint8)
    colours[:1] = _FIRST
    return colours


def coloured(values: Values, legend: Legend) -> Pixels:
    """A mask or a depth map in colours; what does not count is light grey."""
    if legend.depth_range is None:
        table = np.full((256, 3), _VOID_GREY, np.uint8)
        table[: len(legend.colours)] = np.array(legend.colours, np.uint8)
        return table[values]
    least, most = legend.depth_range
    shown = (255 * colormaps[_DEPTH_COLOURS](np.clip((values - least) / (most - least), 0, 1))[..., :3]).astype(
        np.uint8
    )
    shown[values <= 0] = _VOID_GREY
    return shown


def overlay(pixels: Pixels, values: Values, legend: Legend) -> Pixels:
    """A photo under its colours, of the same size."""
    mixed = (1 - _OVERLAY) * pixels.astype(np.float32) + _OVERLAY * coloured(values, legend)
    return mixed.round().astype(np.uint8)


def save_panels(path: Path, panels: Sequence[Panel], legend: Legend, *, title: str) -> None:
    """Draws rows of photo, truth, prediction and overlay; without truth, rows of photo, prediction and overlay.

    Args:
        path: PNG file to write.
        panels: one row each, at least one; photos and values of a row have one size.
        legend: of the values.
        title: one line.
    """
    heads = ["photo", "truth", "prediction", "prediction over the photo"]
    if panels[0].truth is None:
        heads.remove("truth")
    heights = [_CELL * min(1.4, max(0.5, one.pixels.shape[0] / one.pixels.shape[1])) + _ROW_GAP for one in panels]
    below = 0.75 if legend.depth_range else 0.35 + 0.24 * -(-min(len(legend.names), _MOST_NAMED) // 6)
    width, height = len(heads) * (_CELL + 0.12) + 0.3, _TOP + sum(heights) + below
    figure = Figure(figsize=(width, height), facecolor="white")
    top = height - _TOP
    for row, (panel, tall) in enumerate(zip(panels, heights)):
        shown = [panel.pixels, coloured(panel.prediction, legend), overlay(panel.pixels, panel.prediction, legend)]
        if panel.truth is not None:
            shown.insert(1, coloured(panel.truth, legend))
        top -= tall
        for column, pixels in enumerate(shown):
            left = 0.2 + column * (_CELL + 0.12)
            axes = figure.add_axes((left / width, top / height, _CELL / width, (tall - _ROW_GAP) / height))
            axes.imshow(pixels, interpolation="nearest" if column else interpolation(pixels))
            axes.set_axis_off()
            axes.set_anchor("N")
            text = {0: shorten_middle(panel.name, 34), len(shown) - 1: panel.score}.get(column, "")
            place = (left / width, (top + tall - _ROW_GAP + 0.05) / height)
            figure.text(*place, text, fontsize=8, color=MUTED)
            if row == 0:
                figure.text(place[0], place[1] + 0.17 / height, heads[column], fontsize=9.5, color=INK, weight="bold")
    _draw_legend(figure, legend)
    set_title(figure, title, 11)
    save_figure(figure, path)


def _draw_legend(figure: Figure, legend: Legend) -> None:
    """Names the classes, or draws the colours of depth, at the bottom."""
    width, height = figure.get_size_inches()
    if legend.depth_range:
        axes = figure.add_axes((0.2 / width, 0.34 / height, 3.2 / width, 0.13 / height))
        axes.imshow(
            np.linspace(0, 1, 256)[None], cmap=_DEPTH_COLOURS, aspect="auto", extent=(*legend.depth_range, 0, 1)
        )
        axes.set_yticks([])
        axes.tick_params(colors=MUTED, labelsize=8, length=2)
        figure.text(0.2 / width, 0.52 / height, "depth (m)", fontsize=8.5, color=INK)
        return
    named = list(zip(legend.names, legend.colours))[:_MOST_NAMED]
    patches = [Patch(color=np.array(colour) / 255, label=shorten(name, 18)) for name, colour in named]
    figure.legend(handles=patches, loc="lower left", ncols=6, frameon=False, fontsize=8.5, labelcolor=INK)


def save_class_bars(
    path: Path,
    iou: Mapping[str, float | None],
    colours: Sequence[Sequence[int]],
    *,
    mean: float,
    interval: tuple[float, float],
    title: str,
) -> None:
    """Draws the IoU of each class, the mean with its interval as a band.

    Args:
        path: PNG file to write.
        iou: of each class, as a fraction; None for one that does not occur.
        colours: of the classes.
        mean: of the classes.
        interval: its two ends.
        title: one line.
    """
    figure = Figure(figsize=(7.6, 1.5 + _CLASS_HEIGHT * len(iou)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for row, (value, colour) in enumerate(zip(iou.values(), colours)):
        axes.barh(row, 100 * (value or 0), 0.72, color=np.array(colour) / 255)
        text = "does not occur" if value is None else f"{100 * value:.1f}"
        axes.text(100 * (value or 0) + 0.8, row, text, va="center", fontsize=8.5, color=INK)
    axes.axvspan(*(100 * end for end in interval), color=GRID, zorder=0)
    axes.axvline(100 * mean, color=INK, lw=1, label=f"mean {100 * mean:.1f}, 95 % interval shaded")
    axes.set_yticks(range(len(iou)), [shorten(name, 26) for name in iou])
    axes.set(xlim=(0, 108), ylim=(len(iou) - 0.5, -0.5))
    style(axes, "intersection over union (%)", "")
    axes.grid(False, axis="y")
    axes.set_xticks(range(0, 101, 20))
    figure.legend(loc="outside lower right", frameon=False, fontsize=9, labelcolor=INK)
    set_title(figure, title, 11)
    save_figure(figure, path)


def save_training(
    path: Path, epochs: Sequence[Mapping[str, float]], measure: str, *, best_epoch: int, title: str
) -> None:
    """Draws the training loss and the validation score by epoch; the kept epoch is marked.

    Args:
        path: PNG file to write.
        epochs: with "epoch", "train_loss" and the measure.
        measure: "mean_iou", a fraction, or "rmse", in metres.
        best_epoch: number of the kept epoch.
        title: one line.
    """
    figure = Figure(figsize=(9.5, 3.9), layout="constrained", facecolor="white")
    share = measure == "mean_iou"
    labels = {
        "train_loss": "cross-entropy (nats)" if share else "scale-invariant loss",
        measure: "mean IoU (%)" if share else "RMSE (m)",
    }
    numbers = [one["epoch"] for one in epochs]
    for axes, (name, label), color, which in zip(
        figure.subplots(1, 2), labels.items(), (BLUE, ORANGE), ("training windows", "validation windows")
    ):
        values = [one[name] * (100 if name == measure and share else 1) for one in epochs]
        axes.plot(numbers, values, color=color, lw=1.8, marker="o" if len(numbers) <= 30 else None, ms=4, label=which)
        axes.axvline(best_epoch, color=MUTED, lw=1, ls=":", label=f"kept: epoch {best_epoch}")
        style(axes, "epoch", label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        if name == measure and share:
            bound_percent(axes, "y")
    set_title(figure, title)
    save_figure(figure, path)
