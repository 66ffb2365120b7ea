"""Contact sheets: rows of small images with their text."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.figures.style import BLUE, GRID, INK, MUTED, interpolation, save_figure, shorten

COLUMNS = 8
_CELL, _GAP, _TEXT, _HEADING, _TITLE, _MARGIN = 1.4, 0.14, 0.42, 0.42, 0.78, 0.2  # inches
_LETTERS = 21  # that fit below an image
_LINE = 120  # letters that fit across


@dataclasses.dataclass(frozen=True)
class Cell:
    """An image, or None where it cannot be shown, with two lines of text; `marked` cells are framed."""

    pixels: UInt8[np.ndarray, "_height _width 3"] | None
    text: str
    name: str
    marked: bool = False


@dataclasses.dataclass(frozen=True)
class Band:
    """Cells under a heading, which may be empty; those that do not fit one row are continued on the next."""

    heading: str
    cells: Sequence[Cell]


def save_sheet(path: Path, bands: Sequence[Band], *, title: str, note: str) -> None:
    """Draws bands of images, 8 to a row.

    Args:
        path: PNG file to write.
        bands: in order.
        title: first line.
        note: second line.
    """
    places, bottom = _places(bands)
    width, height = 2 * _MARGIN + COLUMNS * (_CELL + _GAP) - _GAP, bottom + _MARGIN
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))  # in inches, from the upper left corner
    axes.set_axis_off()
    axes.text(_MARGIN, 0.3, shorten(title, _LINE), fontsize=13, color=INK, va="center")
    axes.text(_MARGIN, 0.58, shorten(note, _LINE + 20), fontsize=9, color=MUTED, va="center")
    for band, (top, first) in zip(bands, places):
        left, head = _MARGIN + first * (_CELL + _GAP), _HEADING if band.heading else 0
        heading = shorten(band.heading, _LINE if len(band.cells) >= COLUMNS else _LETTERS * len(band.cells))
        axes.text(left, top + 0.25, heading, fontsize=10.5, color=INK, va="center", weight="bold")
        for place, cell in enumerate(band.cells):
            row, column = divmod(place, COLUMNS)
            _draw(axes, cell, left + column * (_CELL + _GAP), top + head + row * (_CELL + _TEXT + _GAP))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("auto")
    save_figure(figure, path)


def _places(bands: Sequence[Band]) -> tuple[list[tuple[float, int]], float]:
    """The top of each band in inches, and its first column; then where the last one ends.

    A band stands beside the one before it if both fit the row.
    """
    places: list[tuple[float, int]] = []
    top, bottom, column = _TITLE, _TITLE, 0
    for band in bands:
        if column + len(band.cells) > COLUMNS:
            top, column = bottom, 0
        places.append((top, column))
        rows = -(-len(band.cells) // COLUMNS)
        bottom = max(bottom, top + (_HEADING if band.heading else 0) + rows * (_CELL + _TEXT + _GAP))
        column += len(band.cells)
    return places, bottom


def _draw(axes: Axes, cell: Cell, left: float, top: float) -> None:
    """Draws one image, whole and centred in its square, and the text below it."""
    axes.add_patch(Rectangle((left, top), _CELL, _CELL, fc="#f5f6f8", ec=BLUE if cell.marked else GRID,
                             lw=2.2 if cell.marked else 0.8))  # fmt: skip
    if cell.pixels is None:
        axes.text(left + _CELL / 2, top + _CELL / 2, "no image", fontsize=8, color=MUTED, ha="center", va="center")
    else:
        rows, columns = cell.pixels.shape[:2]
        inside = _CELL - 0.06
        tall, wide = (inside * side / max(rows, columns) for side in (rows, columns))
        x, y = left + (_CELL - wide) / 2, top + (_CELL - tall) / 2
        extent = (x, x + wide, y + tall, y)
        axes.imshow(cell.pixels, extent=extent, aspect="auto", interpolation=interpolation(cell.pixels), zorder=2)
    color, weight = (BLUE, "bold") if cell.marked else (INK, "normal")
    middle = {"x": left + _CELL / 2, "ha": "center", "va": "center"}
    axes.text(y=top + _CELL + 0.12, s=shorten(cell.text, _LETTERS), fontsize=8.5, color=color, weight=weight, **middle)
    axes.text(y=top + _CELL + 0.29, s=_end(cell.name), fontsize=7.5, color=MUTED, **middle)


def _end(name: str) -> str:
    """The end of a path, which tells files apart better than its beginning."""
    return name if len(name) <= _LETTERS + 3 else "…" + name[-_LETTERS - 2 :]
