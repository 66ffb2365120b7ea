"""The choice of a point in an image by a click in a window."""

import numpy as np
from jaxtyping import UInt8
from matplotlib import pyplot
from matplotlib.figure import Figure

from dinojax.errors import UserError

Pixels = UInt8[np.ndarray, "height width 3"]


def clicked_point(pixels: Pixels, title: str) -> tuple[int, int]:
    """Opens the image in a window and waits for a click on it; returns x and y of the pixel.

    Raises:
        UserError: no window can be opened, or it was closed without a click.
    """
    figure = pyplot.figure(title, layout="constrained")
    try:
        if figure.canvas.required_interactive_framework is None:
            raise UserError("--click needs a display, but there is none; give the point as --point X Y")
        return await_click(figure, pixels, title)
    finally:
        pyplot.close(figure)


def await_click(figure: Figure, pixels: Pixels, title: str) -> tuple[int, int]:
    """Shows the image in an open figure and waits for a click on it; returns x and y of the pixel.

    Raises:
        UserError: the figure was closed without a click.
    """
    axes = figure.subplots()
    axes.imshow(pixels, interpolation="nearest")
    axes.set_title(title, parse_math=False)
    found = figure.ginput(1, timeout=0)
    if not found:
        raise UserError("--click: the window was closed without a click; click on the image, or give --point X Y")
    (x, y), (height, width) = found[0], pixels.shape[:2]
    return min(max(round(x), 0), width - 1), min(max(round(y), 0), height - 1)
