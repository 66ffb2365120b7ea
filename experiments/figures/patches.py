"""Figures of the tasks on patches: lines between matches, and panels of photos with masks, boxes and heat maps."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.figures.style import BLUE, INK, MUTED, ORANGE, interpolation, save_figure, shorten, shorten_middle

Pixels = UInt8[np.ndarray, "_height _width 3"]
_HEAT = "magma"
_TITLE, _LABEL, _GAP = 0.66, 0.24, 0.12  # inches
_MOST_WIDTH, _LEAST_WIDTH, _LARGE, _SMALL = 13.0, 7.0, 4.6, 2.4
_LETTER = 0.092  # width of a letter of the title, in inches
_TINT = np.array([int(BLUE[i : i + 2], 16) for i in (1, 3, 5)])


class Panel(NamedTuple):
    """A photo with what is drawn over it.

    Attributes:
        pixels: RGB.
        text: above the photo.
        mask: its patches or pixels are tinted, the others pale.
        box: whether the box of the mask is drawn.
        outline: another mask, whose edge is drawn.
        heat: values of patches or pixels, drawn instead of the photo.
        heat_range: values of the darkest and of the brightest colour; None takes those that occur.
        indices: numbers of objects, each of which is tinted in a colour of its own; 0 is left as it is.
    """

    pixels: Pixels
    text: str
    mask: Bool[np.ndarray, "_rows _columns"] | None = None
    box: bool = False
    outline: Bool[np.ndarray, "_rows2 _columns2"] | None = None
    heat: Float[np.ndarray, "_rows3 _columns3"] | None = None
    heat_range: tuple[float, float] | None = None
    indices: UInt8[np.ndarray, "_rows4 _columns4"] | None = None


def save_panels(path: Path, rows: Sequence[Sequence[Panel]], *, title: str, note: str) -> None:
    """Draws rows of panels; rows of few panels share a line of the figure.

    Args:
        path: PNG file to write.
        rows: all of the same length.
        title: first line.
        note: second line.
    """
    length = max(len(row) for row in rows)
    aspect = float(np.median([row[0].pixels.shape[1] / row[0].pixels.shape[0] for row in rows]))
    side = _LARGE if len(rows) == 1 and length <= 3 else _SMALL
    width = min(side * aspect**0.5, (_MOST_WIDTH - _GAP) / length - _GAP)
    height = width / aspect
    beside = min(max(1, int((_MOST_WIDTH - _GAP) / (length * (width + _GAP) + _GAP))), -(-len(rows) // 3))
    lines = -(-len(rows) // beside)
    figure = _figure(beside * (length * (width + _GAP) + _GAP), _TITLE + lines * (height + _LABEL + _GAP), title, note)
    full, tall = figure.get_size_inches()
    for number, row in enumerate(rows):
        line, column = number // beside, number % beside
        for place, panel in enumerate(row):
            left = _GAP + column * (length * (width + _GAP) + _GAP) + place * (width + _GAP)
            top = _TITLE + line * (height + _LABEL + _GAP) + _LABEL
            axes = figure.add_axes((left / full, 1 - (top + height) / tall, width / full, height / tall))
            _draw(axes, panel, letters=int(width / 0.066))
    save_figure(figure, path)


def save_matches(
    path: Path,
    images: Sequence[Pixels],
    places: Sequence[Float[np.ndarray, "matches 2"]],
    *,
    title: str,
    note: str,
) -> None:
    """Draws two photos side by side, and a line for each match; its colour is that of its place in the first photo.

    Args:
        path: PNG file to write.
        images: RGB.
        places: row and column of each match in pixels of either image.
        title: first line.
        note: second line.
    """
    height = _LARGE
    widths = [height * pixels.shape[1] / pixels.shape[0] for pixels in images]
    scale = min(1.0, (_MOST_WIDTH - 3 * _GAP) / sum(widths))
    height, widths = height * scale, [width * scale for width in widths]
    figure = _figure(sum(widths) + 3 * _GAP, _TITLE + height + _GAP, title, note)
    full, tall = figure.get_size_inches()
    corners = []
    for left, width, pixels in zip((_GAP, 2 * _GAP + widths[0]), widths, images):
        axes = figure.add_axes((left / full, _GAP / tall, width / full, height / tall))
        axes.imshow(pixels, interpolation=interpolation(pixels))
        axes.set_axis_off()
        corners.append((left, width / pixels.shape[1], height / pixels.shape[0]))
    over = figure.add_axes((0, 0, 1, 1), zorder=3)
    over.set_axis_off()
    over.set_xlim(0, full)
    over.set_ylim(0, tall)
    hues = _place_colours(places[0], images[0].shape[:2])
    for one, other, colour in zip(*places, hues):
        ends = [
            (left + column * across, _GAP + height - row * down)
            for (row, column), (left, across, down) in zip((one, other), corners)
        ]
        x, y = zip(*ends)
        over.plot(x, y, color="white", lw=1.6, alpha=0.45)
        over.plot(x, y, "o-", color=colour, lw=0.9, ms=3, mew=0.4, mec="white")
    save_figure(figure, path)


def _place_colours(places: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A hue for the angle about the centre, paler towards it, so that neighbours have similar colours."""
    offsets = places / np.array(size) - 0.5
    hues = np.arctan2(offsets[:, 0], offsets[:, 1]) / (2 * np.pi) % 1
    strong = np.clip(0.35 + 1.3 * np.hypot(*offsets.T), 0, 1)
    return hsv_to_rgb(np.stack([hues, strong, np.full(len(hues), 0.95)], axis=-1))


def _figure(width: float, height: float, title: str, note: str) -> Figure:
    full = max(width, _LEAST_WIDTH)
    figure = Figure(figsize=(full, height), facecolor="white")
    letters = int((full - 2 * _GAP) / _LETTER)
    figure.text(_GAP / full, 1 - 0.1 / height, shorten(title, letters), fontsize=12, color=INK, va="top")
    figure.text(_GAP / full, 1 - 0.35 / height, shorten(note, int(1.3 * letters)), fontsize=9, color=MUTED, va="top")
    return figure


def _draw(axes: Axes, panel: Panel, letters: int) -> None:
    height, width = panel.pixels.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.set_axis_off()
    axes.set_anchor("NW")
    axes.set_title(shorten_middle(panel.text, letters), fontsize=8.5, color=INK, loc="left", pad=3)
    if panel.heat is not None:
        low, high = panel.heat_range or (float(panel.heat.min()), float(panel.heat.max()))
        axes.imshow(panel.heat, cmap=_HEAT, vmin=low, vmax=high, extent=extent, interpolation="nearest")
    elif panel.indices is not None:
        axes.imshow(_tinted(panel.pixels, panel.indices), extent=extent)
        for number in np.unique(panel.indices[panel.indices > 0]):
            if not (inside := panel.indices == number).all():
                axes.contour(inside, levels=[0.5], colors=["white"], linewidths=0.8)
    elif panel.mask is not None:
        axes.imshow(_painted(panel.pixels, _enlarged(panel.mask, height, width)), extent=extent)
    else:
        axes.imshow(panel.pixels, interpolation=interpolation(panel.pixels), extent=extent)
    if panel.outline is not None and panel.outline.any() and not panel.outline.all():
        axes.contour(_enlarged(panel.outline, height, width), levels=[0.5], colors=["#35d07f"], linewidths=1.1)
    if panel.box and panel.mask is not None and panel.mask.any():
        down, across = height / panel.mask.shape[0], width / panel.mask.shape[1]
        rows, columns = (np.flatnonzero(panel.mask.any(axis=axis)) for axis in (1, 0))
        corner = across * columns[0] - 0.5, down * rows[0] - 0.5
        size = across * (columns[-1] + 1 - columns[0]), down * (rows[-1] + 1 - rows[0])
        axes.add_patch(Rectangle(corner, *size, fill=False, ec=ORANGE, lw=2))
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def _enlarged(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask at another size, by the nearest value."""
    rows = np.arange(height) * mask.shape[0] // height
    columns = np.arange(width) * mask.shape[1] // width
    return mask[rows][:, columns]


def _painted(pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The photo, tinted inside the mask, pale and grey outside it."""
    grey = pixels.mean(axis=-1, keepdims=True)
    return np.where(inside[..., None], 0.72 * pixels + 0.28 * _TINT, 0.35 * grey + 0.65 * 245).astype(np.uint8)


def _tinted(pixels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """The photo with each object in a colour of its own, hues a golden section apart."""
    hues = (0.06 + 0.618034 * np.arange(256)) % 1
    colours = 255 * hsv_to_rgb(np.stack([hues, np.full(256, 0.8), np.full(256, 0.95)], axis=-1))
    inside = (indices > 0)[..., None]
    return np.where(inside, 0.45 * pixels + 0.55 * colours[indices], pixels).astype(np.uint8)
