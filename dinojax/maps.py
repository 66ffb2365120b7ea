"""Maps over the patches of an image: attention of the class token, masks from it, patch PCA, patch similarity.

A map has one value per patch, "rows columns"; `upsample` turns it into pixels. Attention comes from
`VisionTransformer.get_last_selfattention`, patch features from `Features.patch_tokens`.

Source: facebookresearch/dino 7c446df `visualize_attention.py` (the maps, the mask by mass); arXiv 2304.07193, Figure 1
(the PCA and its threshold on the first component).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

# A PCA converts this many patches to float64 at once.
_ROWS = 65_536


def cls_attention(
    attention: Float[Array | np.ndarray, "batch heads tokens tokens"],
    rows: int,
    columns: int,
    *,
    num_register_tokens: int = 0,
) -> Float[Array | np.ndarray, "batch heads rows columns"]:
    """The attention of the class token to each patch, in each head.

    A map sums to less than one, because the class token also attends to itself and to the registers.

    Args:
        attention: probabilities; the tokens are in the order CLS, registers, patches.
        rows: patches from top to bottom.
        columns: patches from left to right.
        num_register_tokens: number of register tokens of the model.

    Raises:
        ValueError: the number of tokens is not 1 + `num_register_tokens` + `rows` · `columns`.
    """
    *lead, _, tokens = attention.shape
    if tokens != 1 + num_register_tokens + rows * columns:
        raise ValueError(f"{tokens} tokens are not CLS, {num_register_tokens} registers and {rows}×{columns} patches")
    return attention[:, :, 0, 1 + num_register_tokens :].reshape(*lead, rows, columns)


def score_mask(
    attention: Float[Array | np.ndarray, "*maps rows columns"], threshold: float
) -> Bool[np.ndarray, "*maps rows columns"]:
    """The patches whose attention is at least `threshold` times the largest of their map.

    A higher threshold keeps fewer patches: 0 keeps all, 1 only the most attended one.
    """
    attention = np.asarray(attention, np.float64)
    return attention >= threshold * attention.max(axis=(-2, -1), keepdims=True)


def mass_mask(
    attention: Float[Array | np.ndarray, "*maps rows columns"], mass: float
) -> Bool[np.ndarray, "*maps rows columns"]:
    """The smallest set of patches with at least the share `mass`, in (0, 1], of the attention of their map.

    Upstream's rule: sorted in ascending order, the patches whose cumulative share is above 1 − `mass`.
    """
    flat = np.asarray(attention, np.float64).reshape(*attention.shape[:-2], -1)
    order = np.argsort(flat, axis=-1, kind="stable")
    cumulative = np.cumsum(np.take_along_axis(flat, order, -1), axis=-1)
    mask = np.zeros(flat.shape, bool)
    np.put_along_axis(mask, order, cumulative > (1 - mass) * cumulative[..., -1:], axis=-1)
    return mask.reshape(attention.shape)


def value_range(
    values: Float[Array | np.ndarray, "*shape"], percentiles: tuple[float, float] = (1, 99)
) -> tuple[float, float]:
    """Two percentiles of the values of a map, for its darkest and its brightest colour.

    Attention is often nearly uniform: colours from 0 to the maximum would show one colour. Where the percentiles are
    equal, the range is that of all values, and where these are equal, one about them.
    """
    values = np.asarray(values, np.float64)
    low, high = np.percentile(values, percentiles)
    if low == high:
        low, high = values.min(), values.max()
    margin = 0.0 if low < high else abs(low) or 1.0
    return float(low - margin), float(high + margin)


class PcaMap(NamedTuple):
    """The patches of an image as colours in 0–1, black in the background."""

    rgb: Float[np.ndarray, "rows columns 3"]
    foreground: Bool[np.ndarray, "rows columns"]


def foreground_scores(
    features: Sequence[Float[Array | np.ndarray, "_rows _columns dim"]], *, flip: bool = False
) -> list[Float[np.ndarray, "_rows _columns"]]:
    """The first principal component of the patches of all images together, scaled to 0–1: high in the foreground.

    Its sign is arbitrary, so it is chosen to be low along the borders of the images, where objects rarely are.

    Args:
        features: patch features of each image; the images may differ in size.
        flip: choose the other sign.
    """
    shapes = [image.shape[:2] for image in features]
    border = np.concatenate([_border(*shape).ravel() for shape in shapes])
    first = _principal(_all_patches(features), 1)[:, 0]
    inwards = border.all() or first[border].mean() <= first[~border].mean()
    scores = _scaled(first if inwards != flip else -first)
    ends = np.cumsum([rows * columns for rows, columns in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(scores, ends), shapes)]


def pca_maps(
    features: Sequence[Float[Array | np.ndarray, "_rows _columns dim"]],
    *,
    threshold: float | None = 0.5,
    flip: bool = False,
    least_foreground: float = 0.05,
) -> list[PcaMap]:
    """The first three principal components of patch features as red, green and blue, with one basis for all images.

    The foreground is where `foreground_scores` are above the threshold. A second PCA over it gives the colours, each
    component scaled to 0–1. No image is black: one of which hardly any patch is above the threshold keeps all patches.

    Args:
        features: patch features of each image; the images may differ in size.
        threshold: threshold of the first component, in [0, 1); None takes every patch as foreground.
        flip: take the patches below the threshold as foreground.
        least_foreground: share of an image's patches; with fewer in the foreground, all of its patches are.

    Returns:
        One map per image.
    """
    shapes = [image.shape[:2] for image in features]
    patches = _all_patches(features)
    foreground = np.ones(len(patches), bool)
    if threshold is not None:
        foreground = np.concatenate([score.ravel() for score in foreground_scores(features, flip=flip)]) > threshold
        ends = np.cumsum([rows * columns for rows, columns in shapes])
        for end, (rows, columns) in zip(ends, shapes):
            inside = foreground[end - rows * columns : end]
            inside |= inside.mean() < least_foreground
    rgb = np.zeros((len(patches), 3))
    rgb[foreground] = _scaled(_principal(patches[foreground], 3))
    ends = np.cumsum([rows * columns for rows, columns in shapes])[:-1]
    parts = zip(shapes, np.split(rgb, ends), np.split(foreground, ends))
    return [PcaMap(colours.reshape(*shape, 3), inside.reshape(shape)) for shape, colours, inside in parts]


def patch_similarity(
    features: Float[Array | np.ndarray, "rows columns dim"], patch: Float[Array | np.ndarray, " dim"]
) -> Float[np.ndarray, "rows columns"]:
    """Cosine similarity of each patch of an image to the features `patch`, which may be of another image."""
    features, patch = np.asarray(features, np.float64), np.asarray(patch, np.float64)
    return features @ patch / (np.linalg.norm(features, axis=-1) * np.linalg.norm(patch))


def upsample(
    maps: Shaped[np.ndarray, "*shape"], patch_size: int, *, axes: tuple[int, int] = (-2, -1)
) -> Shaped[np.ndarray, "*pixels"]:
    """Repeats each patch as `patch_size` × `patch_size` pixels (nearest neighbour); `axes` are rows and columns."""
    return maps.repeat(patch_size, axes[0]).repeat(patch_size, axes[1])


def _all_patches(features: Sequence[Float[Array | np.ndarray, "_rows _columns dim"]]) -> np.ndarray:
    return np.concatenate([np.asarray(image, np.float32).reshape(-1, image.shape[-1]) for image in features])


def _principal(x: Float[np.ndarray, "patches dim"], count: int) -> Float[np.ndarray, "patches {count}"]:
    """Coordinates along the directions of largest variance; the largest loading of each direction is positive."""
    mean = x.mean(axis=0, dtype=np.float64)
    chunks = np.array_split(x, -(-len(x) // _ROWS))
    scatter = sum((chunk - mean).T @ (chunk - mean) for chunk in chunks)
    directions = np.linalg.eigh(scatter)[1][:, : -count - 1 : -1]
    largest = np.abs(directions).argmax(axis=0)
    directions *= np.sign(np.take_along_axis(directions, largest[None], 0))
    return np.concatenate([(chunk - mean) @ directions for chunk in chunks])


def _scaled(x: Float[np.ndarray, "patches *components"]) -> Float[np.ndarray, "patches *components"]:
    """Scales each component to 0–1; a constant component becomes 0.5."""
    least, spread = x.min(axis=0), np.ptp(x, axis=0)
    return np.where(spread > 0, (x - least) / np.where(spread > 0, spread, 1), 0.5)


def _border(rows: int, columns: int) -> Bool[np.ndarray, "rows columns"]:
    border = np.ones((rows, columns), bool)
    border[1:-1, 1:-1] = False
    return border
