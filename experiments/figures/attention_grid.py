"""The figure of the demo: rows of images, each with the attention of every head."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from dinojax.maps import value_range
from experiments.figures.style import INK, MUTED, save_figure

_PANEL, _TOP, _HEAD = 1.15, 0.75, 0.25  # inches


def save_attention_grid(
    path: Path,
    images: UInt8[np.ndarray, "images height width 3"],
    attention: Float[np.ndarray, "images maps rows columns"],
    *,
    title: str,
    note: str,
) -> None:
    """Draws each image, then the attention of its class token: the mean of the heads and every head.

    The colours of a map range from its 1st to its 99th percentile (`dinojax.maps.value_range`).

    Args:
        path: PNG file to write.
        images: RGB.
        attention: attention probabilities: first the mean of the heads, then each head.
        title: first line.
        note: second line.
    """
    rows, columns = len(images), 1 + attention.shape[1]
    width, height = _PANEL * columns, _TOP + _HEAD + _PANEL * rows
    figure = Figure(figsize=(max(width, 7.0), height), facecolor="white")
    panels = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.02, 0.02, 0.98, 1 - (_TOP + _HEAD) / height, 0.06, 0.06)
    for line, (text, size, color) in enumerate(((title, 12, INK), (note, 9, MUTED))):
        figure.text(0.02, 1 - (0.25 + 0.27 * line) / height, text, fontsize=size, color=color, va="center")
    for panel, name in zip(panels[0], ("image", "mean", *(f"head {i + 1}" for i in range(columns - 2)))):
        panel.set_title(name, fontsize=9, color=INK, pad=4)
    for row, image, maps in zip(panels, images, attention):
        _draw_row(row, image, maps)
    save_figure(figure, path)


def _draw_row(axes: np.ndarray, image: np.ndarray, maps: np.ndarray) -> None:
    for panel in axes:
        panel.set_axis_off()
    axes[0].imshow(image, interpolation="nearest")
    for panel, values in zip(axes[1:], maps):
        low, high = value_range(values)
        panel.imshow(values, cmap="magma", vmin=low, vmax=high, interpolation="nearest")
