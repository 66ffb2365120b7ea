"""Figures of the results of classifiers: metrics, confusion matrix, grids of settings, feature map, predictions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from experiments.figures.style import (
    BLUE,
    GREEN,
    GRID,
    INK,
    MUTED,
    ORANGE,
    RED,
    bound_percent,
    interpolation,
    save_figure,
    set_title,
    shorten,
    shorten_middle,
    style,
)

# Weighted recall is the accuracy.
_BARS = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}
_BARS |= {f"weighted_{name.lower()}": f"weighted {name}" for name in ("precision", "F1")}
_MOST_LABELLED, _MOST_NUMBERED = 30, 12  # classes whose names, and whose percentages, fit a confusion matrix
_MOST_COLOURS = 20
_LINES = (BLUE, ORANGE, GREEN, RED)


def save_bars(
    path: Path,
    metrics: Mapping[str, Mapping[str, Any]],
    titles: Mapping[str, str],
    *,
    evaluated: str = "test",
    balanced: bool = False,
    title: str,
) -> None:
    """Draws accuracy, weighted precision and F1 of every classifier on test and training images.

    The test metrics have confidence intervals, and the test accuracy is written below the bars.

    Args:
        path: PNG file to write.
        metrics: classifier → "train" and "test" → metrics as `compute_metrics` returns them.
        titles: classifier → its title.
        evaluated: what the test images are called.
        balanced: whether to draw balanced accuracy beside accuracy.
        title: one line.
    """
    bars = {key: label for key, label in _BARS.items() if balanced or key != "balanced_accuracy"}
    names = list(metrics)
    figure = Figure(figsize=(max(8.0, 2.0 + 1.7 * len(names)), 4.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    width, colors = 0.19, ("#1d4777", "#2f6db5", "#6d9ed4", "#a9c8ea")
    for place, (key, label) in enumerate(bars.items()):
        x = np.arange(len(names)) + (place - (len(bars) - 1) / 2) * (width + 0.02)
        test, train = ([100 * metrics[name][part][key] for name in names] for part in ("test", "train"))
        ends = 100 * np.array([metrics[name]["test"]["interval"][key] for name in names]).T
        # A percentile interval need not contain the value; the error bar then ends at the value.
        errors = np.maximum([test - ends[0], ends[1] - test], 0)
        axes.bar(x, test, width, color=colors[place], label=f"{label}, {evaluated}")
        axes.errorbar(x, test, errors, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        axes.plot(x, train, "_", color=ORANGE, ms=9, mew=2, label="the same on training images" if place == 0 else None)
    style(axes, "", "%")
    axes.grid(visible=False, axis="x")
    shown = [f"{_wrapped(titles[name])}\n{100 * metrics[name]['test']['accuracy']:.1f} % correct" for name in names]
    axes.set_xticks(range(len(names)), shown)
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
    training, *others = zip(*axes.get_legend_handles_labels())
    handles, labels = zip(*others, training)
    ncols = -(-len(handles) // 2)
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9, labelcolor=INK)
    set_title(figure, title)
    save_figure(figure, path)


def save_confusion(
    path: Path, confusion: Int[np.ndarray, "classes classes"], class_names: Sequence[str], *, title: str
) -> None:
    """Draws the share of each true class (row) by predicted class (column).

    Class names are shown for up to 30 classes, percentages for up to 12. The colours end at the largest share.
    """
    classes = len(class_names)
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = min(9.0, max(5.4, 3.0 + 0.42 * classes))
    figure = Figure(figsize=(side + 0.9, side), layout="constrained", facecolor="white")
    axes = figure.subplots()
    # The square root keeps rare mistakes visible beside the diagonal.
    top = max(float(shares.max()), 1.0)
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, top), interpolation="nearest")
    ticks = [tick for tick in (0, 1, 5, 10, 25, 50, 75, 100) if tick <= top]
    bar = figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8, ticks=ticks)
    bar.outline.set_visible(False)
    if classes <= _MOST_LABELLED:
        names = [shorten_middle(name, 26 if classes <= _MOST_NUMBERED else 18) for name in class_names]
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
        axes.set_xticks(range(classes), names, **turned)
        axes.set_yticks(range(classes), names)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    if classes <= _MOST_NUMBERED:
        for i, j in np.argwhere(shares >= 0.5):
            color = "white" if shares[i, j] > 0.35 * top else INK
            axes.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", fontsize=8, color=color)
    note = "" if classes <= _MOST_LABELLED else f" ({classes} classes, in order of their index)"
    axes.set_xlabel(f"predicted class{note}", color=INK)
    axes.set_ylabel("true class", color=INK)
    axes.tick_params(length=0, labelcolor=INK, labelsize=9)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    set_title(figure, title, 11)
    save_figure(figure, path)


def save_grid(
    path: Path,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    chosen: tuple[float, float],
    *,
    xlabel: str,
    ylabel: str,
    title: str,
) -> None:
    """Draws accuracy over a logarithmic grid of settings, with a line for each variant, and the selected setting.

    Args:
        path: PNG file to write.
        x: values of the setting.
        lines: variant → accuracy (fraction) at each value.
        chosen: value and accuracy of the selected setting.
        xlabel: label of the setting.
        ylabel: label of the accuracy.
        title: one line.
    """
    figure = Figure(figsize=(7, 4.4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for color, (label, accuracies) in zip(_LINES, lines.items()):
        axes.plot(x, 100 * np.asarray(accuracies), color=color, marker="o", ms=4, label=label)
    axes.plot(chosen[0], 100 * chosen[1], "o", ms=12, mfc="none", mec=INK, mew=1.5, label="selected")
    style(axes, xlabel, ylabel)
    bound_percent(axes, "y")
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    set_title(figure, title)
    save_figure(figure, path)


def save_map(
    path: Path,
    points: Float[np.ndarray, "images 2"],
    labels: Int[np.ndarray, " images"],
    class_names: Sequence[str],
    *,
    axis_labels: tuple[str, str],
    title: str,
) -> None:
    """Draws images as points in the colours of their classes, with a legend for up to 20 classes.

    Args:
        path: PNG file to write.
        points: coordinates in the plane.
        labels: true classes.
        class_names: by class index.
        axis_labels: labels of both axes.
        title: one line.
    """
    few = len(class_names) <= _MOST_COLOURS
    figure = Figure(figsize=(8.2 if few else 7, 6.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    colors = colormaps["tab10" if len(class_names) <= 10 else "tab20" if few else "nipy_spectral"]
    size = float(np.clip(9000 / len(points), 4, 30))
    for index, name in enumerate(class_names):
        chosen = points[labels == index]
        color = colors(index) if few else colors(index / (len(class_names) - 1))
        axes.scatter(*chosen.T, s=size, color=color, alpha=0.75, linewidths=0, label=shorten_middle(name, 26))
    style(axes, *axis_labels)
    axes.tick_params(colors=MUTED)
    if few:
        legend = figure.legend(loc="outside right center", frameon=False, fontsize=9, labelcolor=INK)
        for handle in legend.legend_handles:
            handle.set_sizes([40])
            handle.set_alpha(1)
    set_title(figure, title)
    save_figure(figure, path)


def save_classified(
    path: Path,
    images: Sequence[UInt8[np.ndarray, "_h _w 3"]],
    image_names: Sequence[str],
    predictions: Sequence[Sequence[tuple[str, str, float]]],
    *,
    title: str,
) -> None:
    """Draws images with the prediction of each classifier, and its probability as a bar.

    Args:
        path: PNG file to write.
        images: RGB, of any sizes.
        image_names: names to write above the images.
        predictions: for each image, classifier, class and probability (NaN if there is none).
        title: one line.
    """
    columns = min(2, len(images))
    rows = -(-len(images) // columns)
    height = max(2.1, 0.5 + 0.3 * len(predictions[0]))
    figure = Figure(figsize=(6.4 * columns, 0.5 + height * rows), layout="constrained", facecolor="white")
    panels = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=(1, 1.9) * columns).reshape(-1, 2)
    for picture, bars in panels[len(images) :]:
        picture.set_axis_off()
        bars.set_axis_off()
    for (picture, bars), pixels, name, given in zip(panels, images, image_names, predictions):
        picture.imshow(pixels, interpolation=interpolation(pixels))
        picture.set_axis_off()
        picture.set_title(shorten_middle(name, 22), fontsize=9, color=INK)
        _draw_predictions(bars, given)
    set_title(figure, title)
    save_figure(figure, path)


def _draw_predictions(axes: Axes, given: Sequence[tuple[str, str, float]]) -> None:
    """Draws a line for each classifier; equal classes have the same colour."""
    colors = dict(zip(dict.fromkeys(name for _, name, _ in given), (BLUE, ORANGE, GREEN, RED, *[MUTED] * len(given))))
    for row, (_, name, probability) in enumerate(given):
        axes.barh(row, 1, 0.78, color=GRID)
        axes.barh(row, np.nan_to_num(probability), 0.78, color=colors[name], alpha=0.55)
        percent = "" if np.isnan(probability) else f"{100 * probability:.0f} %"
        axes.text(0.02, row, shorten(name, 27), va="center", fontsize=9, color=INK)
        axes.text(0.98, row, percent, va="center", ha="right", fontsize=9, color=INK)
    axes.set_yticks(range(len(given)), [title for title, *_ in given])
    axes.tick_params(length=0, labelcolor=INK, labelsize=8)
    axes.set_xticks([])
    axes.set(xlim=(0, 1), ylim=(len(given) - 0.5, -0.5))
    for spine in axes.spines.values():
        spine.set_visible(False)


def _wrapped(title: str) -> str:
    return title.replace(", ", ",\n", 1) if ", " in title else title.replace(" ", "\n", 1)
