"""Figures of what a model sees in images: attention of every head, its masks, patch PCA and similarity, depth.

The colours of an attention map range from its 1st to its 99th percentile (`dinojax.maps.value_range`).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dinojax.maps import PcaMap, upsample, value_range
from experiments.figures.style import INK, MUTED, interpolation, save_figure, shorten, shorten_middle

_HEAT = "magma"
_FEW = 4  # images whose panels are drawn larger
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
# In inches.
_SMALL, _MEDIUM, _LARGE = 1.55, 2.3, 4.4  # sides of squares that have the area of a panel
_NARROWEST, _WIDEST, _LOWEST, _HIGHEST = 1.6, 12.0, 0.5, 8.0
_MOST_WIDTH, _LEAST_WIDTH = 14.2, 7.0
_GAP, _LABEL, _HEADING, _TITLE, _BAR, _TICKS = 0.14, 0.26, 0.3, 0.62, 0.7, 0.45
_LETTER = 0.092  # width of a letter of the title


def save_attention(
    path: Path,
    pixels: UInt8[np.ndarray, "height width 3"],
    attention: Float[np.ndarray, "maps rows columns"],
    *,
    title: str,
    note: str,
) -> None:
    """Draws the image and the attention of the class token: the mean of the heads, then every head.

    The range of a panel's colours is written above it, in per cent of all attention.

    Args:
        path: PNG file to write.
        pixels: RGB.
        attention: attention probabilities: first the mean of the heads, then each head.
        title: first line.
        note: second line.
    """
    sheet = _sheet({"": 1 + len(attention)}, pixels.shape[1] / pixels.shape[0], title, note, bottom=_BAR)
    _show(next(sheet.axes), pixels, "image")
    for (name, color), values in zip(_labels(len(attention)), attention):
        axes, (low, high) = next(sheet.axes), value_range(values)
        _show(axes, pixels, name, color, _percent_range(low, high))
        _heat(axes, pixels.shape, values, low, high)
    ends = {0: "1st percentile", 1: "99th percentile of the panel"}
    _bar(sheet.figure, Normalize(0, 1), "attention of the class token to a patch; above each panel, in per cent", ends)
    save_figure(sheet.figure, path)


def _percent_range(low: float, high: float) -> str:
    return f"{100 * low:.2g}–{100 * high:.2g} %" if low > high / 1000 else f"0–{100 * high:.2g} %"


def _share(mask: Bool[np.ndarray, "rows columns"]) -> str:
    share = 100 * mask.mean()
    return "< 1 %" if 0 < share < 0.5 else f"{share:.0f} %"


def save_masks(
    path: Path,
    pixels: UInt8[np.ndarray, "height width 3"],
    masks: Mapping[str, Bool[np.ndarray, "_maps rows columns"]],
    *,
    title: str,
    note: str,
) -> None:
    """Draws masks over the image, each kind under its heading: the mean of the heads, then every head.

    Args:
        path: PNG file to write.
        pixels: RGB.
        masks: heading → masks: first that of the mean of the heads, then that of each head.
        title: first line.
        note: second line.
    """
    counts = {heading: 1 + len(kind) for heading, kind in masks.items()}
    sheet = _sheet(counts, pixels.shape[1] / pixels.shape[0], title, note)
    for kind in masks.values():
        _show(next(sheet.axes), pixels, "image")
        for (name, color), mask in zip(_labels(len(kind)), kind):
            axes = next(sheet.axes)
            inside = upsample(mask, pixels.shape[0] // mask.shape[0])
            _show(axes, _painted(pixels, inside, color), name, color, f"{_share(mask)} kept")
            if not mask.all():
                axes.contour(inside, levels=[0.5], colors=[color], linewidths=1.2)
    save_figure(sheet.figure, path)


def save_pca(
    path: Path,
    images: Sequence[UInt8[np.ndarray, "_height _width 3"]],
    maps: Sequence[PcaMap],
    image_names: Sequence[str],
    *,
    title: str,
    note: str,
) -> None:
    """Draws images, each beside the colours of its patches; the background is black.

    Args:
        path: PNG file to write.
        images: RGB, of any sizes.
        maps: one of each image.
        image_names: names to write above the images.
        title: first line.
        note: second line.
    """
    aspect = float(np.median([pixels.shape[1] / pixels.shape[0] for pixels in images]))
    side = _MEDIUM if len(images) <= _FEW else _SMALL
    sheet = _sheet({"": 2 * len(images)}, aspect, title, note, group=2, side=side)
    for pixels, found, name in zip(images, maps, image_names):
        axes = next(sheet.axes)
        _show(axes, pixels, shorten_middle(name, _letters(axes)))
        axes = next(sheet.axes)
        _show(axes, pixels, "PCA", MUTED, f"{_share(found.foreground)} foreground")
        axes.imshow(found.rgb, extent=_extent(pixels.shape), interpolation="nearest")
    save_figure(sheet.figure, path)


def save_depth(
    path: Path,
    images: Sequence[UInt8[np.ndarray, "_height _width 3"]],
    depths: Sequence[Float[np.ndarray, "_rows _columns"]],
    image_names: Sequence[str],
    *,
    title: str,
    note: str,
) -> None:
    """Draws images, each beside its depth map; the colours have one range for all of them.

    Args:
        path: PNG file to write.
        images: RGB, of any sizes.
        depths: metres, one map of each image, of any size and its shape.
        image_names: names to write above the images.
        title: first line.
        note: second line.
    """
    aspect = float(np.median([pixels.shape[1] / pixels.shape[0] for pixels in images]))
    side = _LARGE if len(images) == 1 else _MEDIUM if len(images) <= _FEW else _SMALL
    sheet = _sheet({"": 2 * len(images)}, aspect, title, note, group=2, side=side, bottom=_BAR)
    low, high = value_range(np.concatenate([depth.ravel() for depth in depths]))
    for pixels, depth, name in zip(images, depths, image_names):
        axes = next(sheet.axes)
        _show(axes, pixels, shorten_middle(name, _letters(axes)))
        axes = next(sheet.axes)
        _show(axes, pixels, "depth", MUTED, f"{depth.min():.2f}–{depth.max():.2f} m")
        _heat(axes, pixels.shape, depth, low, high)
    _bar(sheet.figure, Normalize(low, high), "metres, from the 1st to the 99th percentile of all maps")
    save_figure(sheet.figure, path)


class SheetRow(NamedTuple):
    """One image of a contact sheet.

    Attributes:
        pixels: RGB.
        name: to write above the image.
        attention: the mean of the heads.
        mask: the patches that hold most of it.
        similarity: to one of the patches.
        pca: colours of the patches.
    """

    pixels: UInt8[np.ndarray, "height width 3"]
    name: str
    attention: Float[np.ndarray, "rows columns"]
    mask: Bool[np.ndarray, "rows columns"]
    similarity: Float[np.ndarray, "rows columns"]
    pca: PcaMap


def save_contact_sheet(path: Path, images: Sequence[SheetRow], *, title: str, note: str) -> None:
    """Draws a row for each image: attention (the mean of the heads), its mask, similarity and PCA of the patches.

    Args:
        path: PNG file to write.
        images: one or more, of any sizes.
        title: first line.
        note: second line.
    """
    aspect = float(np.median([image.pixels.shape[1] / image.pixels.shape[0] for image in images]))
    sheet = _sheet({"": 5 * len(images)}, aspect, title, note, group=5, side=_SMALL)
    for image in images:
        pixels, axes = image.pixels, next(sheet.axes)
        _show(axes, pixels, shorten_middle(image.name, _letters(axes)))
        axes, (low, high) = next(sheet.axes), value_range(image.attention)
        _show(axes, pixels, "attention", MUTED, _percent_range(low, high))
        _heat(axes, pixels.shape, image.attention, low, high)
        axes, inside = next(sheet.axes), upsample(image.mask, pixels.shape[0] // image.mask.shape[0])
        _show(axes, _painted(pixels, inside, to_rgb(INK)), "mask", MUTED, f"{_share(image.mask)} kept")
        axes = next(sheet.axes)
        _show(axes, pixels, "similarity", MUTED, f"min {image.similarity.min():.2f}")
        _heat(axes, pixels.shape, image.similarity, *_similarity_range(image.similarity))
        axes = next(sheet.axes)
        _show(axes, pixels, "PCA", MUTED, f"{_share(image.pca.foreground)} coloured")
        axes.imshow(image.pca.rgb, extent=_extent(pixels.shape), interpolation="nearest")
    save_figure(sheet.figure, path)


def _letters(axes: Axes) -> int:
    """Letters that fit above a panel."""
    return int(axes.get_position(original=True).width * axes.figure.get_figwidth() / _LETTER)


def _similarity_range(similarity: Float[np.ndarray, "rows columns"]) -> tuple[float, float]:
    return min(float(similarity.min()), 0.999), 1.0


def save_similarity(
    path: Path,
    pixels: UInt8[np.ndarray, "height width 3"],
    similarity: Float[np.ndarray, "rows columns"],
    point: tuple[int, int],
    *,
    title: str,
    note: str,
) -> None:
    """Draws the image, its pixels numbered along the edges, beside the similarity of its patches to one of them.

    Args:
        path: PNG file to write.
        pixels: RGB.
        similarity: cosine similarities.
        point: x and y of a pixel in the patch that others are compared with, which is outlined.
        title: first line.
        note: second line.
    """
    aspect, patch = pixels.shape[1] / pixels.shape[0], pixels.shape[0] // similarity.shape[0]
    sheet = _sheet({"": 2}, aspect, title, note, bottom=_BAR - 0.15, side=_LARGE, ticks=_TICKS)
    picture, heat = sheet.axes
    _show(picture, pixels, "image")
    picture.set_axis_on()
    picture.tick_params(colors=MUTED, labelsize=8)
    for spine in picture.spines.values():
        spine.set_visible(False)
    _show(heat, pixels, "similarity", right=f"min {similarity.min():.2f}")
    norm = Normalize(*_similarity_range(similarity))
    _heat(heat, pixels.shape, similarity, norm.vmin, norm.vmax)
    corner = tuple(place // patch * patch - 0.5 for place in point)
    for axes in (picture, heat):
        axes.add_patch(Rectangle(corner, patch, patch, fill=False, ec="white", lw=1.5))
        axes.plot(*point, "o", ms=9, mfc="none", mec=INK, mew=4)
        axes.plot(*point, "o", ms=9, mfc="none", mec="white", mew=2)
    _bar(sheet.figure, norm, "cosine similarity of a patch's features to those of the marked patch")
    save_figure(sheet.figure, path)


@dataclasses.dataclass(frozen=True)
class _Sheet:
    """A figure and its panels, in the order in which they are filled."""

    figure: Figure
    axes: Iterator[Axes]


def _sheet(
    counts: Mapping[str, int],
    aspect: float,
    title: str,
    note: str,
    *,
    side: float = _MEDIUM,
    group: int = 1,
    bottom: float = 0.0,
    ticks: float = 0.0,
) -> _Sheet:
    """Empty panels in rows under headings, placed in inches so that nothing overlaps.

    Args:
        counts: heading → number of panels.
        aspect: width of the images over their height.
        title: first line.
        note: second line.
        side: of a square that has the area of a panel.
        group: number of panels that stay in one row.
        bottom: space for a colour bar.
        ticks: space to the left of each panel and below it.
    """
    width = min(max(side * math.sqrt(aspect), _NARROWEST), _WIDEST)
    height = min(max(side / math.sqrt(aspect), _LOWEST), _HIGHEST)
    step, drop = width + ticks + _GAP, height + ticks + _LABEL + _GAP
    fitting = max(1, int((_MOST_WIDTH - _GAP) / (group * step))) * group
    rows = -(-max(counts.values()) // fitting)
    columns = -(-max(counts.values()) // (rows * group)) * group
    headings = [_HEADING if heading else 0 for heading in counts]
    full = max(_LEAST_WIDTH, _GAP + columns * step)
    tall = _TITLE + sum(headings) + len(counts) * rows * drop + _GAP + bottom
    figure = Figure(figsize=(full, tall), facecolor="white")
    letters = int((full - 2 * _GAP) / _LETTER)
    figure.text(_GAP / full, 1 - 0.1 / tall, shorten(title, letters), fontsize=12, color=INK, va="top")
    figure.text(_GAP / full, 1 - 0.35 / tall, shorten(note, int(1.3 * letters)), fontsize=9, color=MUTED, va="top")
    places, top = [], tall - _TITLE
    for heading, space in zip(counts, headings):
        figure.text(_GAP / full, (top - 0.6 * space) / tall, heading, fontsize=10.5, color=INK, va="center")
        top -= space
        for row, column in itertools.product(range(rows), range(columns)):
            left, low = _GAP + column * step + ticks, top - row * drop - _LABEL - height
            places.append((left / full, low / tall, width / full, height / tall))
        top -= rows * drop
    taken = itertools.chain.from_iterable(
        places[index * rows * columns :][:count] for index, count in enumerate(counts.values())
    )
    return _Sheet(figure, map(figure.add_axes, taken))


def _labels(count: int) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Names and colours of the mean and of the heads; neighbouring heads differ in hue and brightness."""
    yield "mean", to_rgb(INK)
    for head in range(count - 1):
        rgb = hsv_to_rgb((head / (count - 1), 0.85, 1))
        # A bound on the luminance keeps yellow and green readable on white.
        yield f"head {head + 1}", tuple(rgb * min(1, (0.55, 0.4)[head % 2] / (rgb @ _LUMINANCE)))


def _show(axes: Axes, pixels: np.ndarray, left: str, color: str | tuple[float, ...] = INK, right: str = "") -> None:
    """Draws the image at its own aspect in the upper left of its cell, with a text above it on either side."""
    axes.imshow(pixels, interpolation=interpolation(pixels))
    axes.set_axis_off()
    axes.set_anchor("NW")
    cell = axes.get_position(original=True)
    above = cell.y1 + 0.06 / axes.figure.get_figheight()
    axes.figure.text(cell.x0, above, left, fontsize=9, color=color, fontweight="bold")
    axes.figure.text(cell.x1, above, right, fontsize=8, color=MUTED, ha="right")


def _extent(shape: Sequence[int]) -> tuple[float, float, float, float]:
    return (-0.5, shape[1] - 0.5, shape[0] - 0.5, -0.5)


def _heat(axes: Axes, shape: Sequence[int], values: np.ndarray, least: float, largest: float) -> None:
    axes.imshow(values, cmap=_HEAT, vmin=least, vmax=largest, extent=_extent(shape), interpolation="nearest")


def _painted(pixels: np.ndarray, inside: np.ndarray, color: tuple[float, ...]) -> np.ndarray:
    """The image, tinted inside the mask, pale and grey outside it."""
    grey = pixels.mean(axis=-1, keepdims=True)
    tinted = 0.8 * pixels + 0.2 * 255 * np.array(color)
    return np.where(inside[..., None], tinted, 0.3 * grey + 0.7 * 245).astype(np.uint8)


def _bar(figure: Figure, norm: Normalize, label: str, ends: Mapping[float, str] | None = None) -> None:
    """Draws a colour bar in the lower left corner, with a label above it; `ends` are names of its ticks."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes(((_GAP + 0.1) / width, 0.32 / height, 3.2 / width, 0.12 / height))
    bar = figure.colorbar(ScalarMappable(norm, colormaps[_HEAT]), cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    axes.tick_params(colors=MUTED, labelsize=8, length=2)
    if ends:
        bar.set_ticks(list(ends), labels=list(ends.values()))
        for tick, side in zip(axes.get_xticklabels(), ("left", "right")):
            tick.set_horizontalalignment(side)
    figure.text((_GAP + 0.1) / width, 0.5 / height, label, fontsize=8.5, color=INK)
