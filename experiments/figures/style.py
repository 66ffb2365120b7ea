"""Learning curves and example images, and the look that all figures share; without global state or a display."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, MUTED, GRID = "#22262b", "#6b7480", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#2f6db5", "#d9782d", "#2a8a57", "#c43c39"
_DPI = 150
_COLUMNS = 8
_COLUMN, _ROW, _HEADING, _TITLE = 1.6, 2.0, 0.36, 0.45  # inches
_NEAREST_BELOW = 96  # px: smaller images are shown as their pixels, larger ones smoothly


def shorten(name: str, letters: int) -> str:
    """`name`, cut to so many letters with an ellipsis."""
    return name if len(name) <= letters else name[: letters - 1] + "…"


def style(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Two spines, a light grid behind the data, labels in ink."""
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the PNG."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DPI)
