"""The style of all figures. Matplotlib's global state is not used, and no display is needed."""

import textwrap
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

INK, MUTED, GRID = "#22262b", "#6b7480", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#2f6db5", "#d9782d", "#2a8a57", "#c43c39"
_DPI = 150
_SMALL = 96  # px
_LETTER = 0.0086  # width of a letter in inches, for each point of its size


def shorten(name: str, letters: int) -> str:
    """`name`, or its beginning with an ellipsis: at most `letters` letters."""
    return name if len(name) <= letters else name[: letters - 1] + "…"


def shorten_middle(name: str, letters: int) -> str:
    """`name`, or its beginning and its end, which tells numbered files apart: at most `letters` letters."""
    if len(name) <= letters:
        return name
    end = (letters - 1) // 2
    return f"{name[: letters - 1 - end]}…{name[len(name) - end :]}"


def set_title(figure: Figure, text: str, size: float = 12) -> None:
    """Writes a title in the upper left corner; each of its lines takes up to two lines of the figure's width."""
    letters = int((figure.get_figwidth() - 0.2) / (_LETTER * size))
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, letters, max_lines=2, placeholder=" …")]
    figure.suptitle("\n".join(lines), fontsize=size, color=INK, x=0.01, ha="left")


def bound_percent(axes: Axes, axis: str) -> None:
    """Ends an axis of percentages, "x" or "y", at 0 and at 100."""
    low, high = getattr(axes, f"get_{axis}lim")()
    getattr(axes, f"set_{axis}lim")(max(low, 0), min(high, 100))


def interpolation(pixels: UInt8[np.ndarray, "height width 3"]) -> str:
    """Matplotlib's name of how an image is enlarged: a small one pixel by pixel, a large one smoothly."""
    return "nearest" if min(pixels.shape[:2]) < _SMALL else "antialiased"


def style(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Labels the axes and leaves two spines, with a light grid behind the data."""
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG file, in whose texts a dollar sign is a dollar sign.

    Matplotlib would take what is between two of them for mathematics, and refuse most names that hold them. Only the
    numbers along a logarithmic axis are written so.
    """
    logarithmic = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"]
    ticks = [tick for axis in logarithmic for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())]
    powers = {text for tick in ticks for text in (tick.label1, tick.label2)}
    for text in figure.findobj(Text):
        text.set_parse_math(text in powers)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DPI)
