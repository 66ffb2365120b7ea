"""Features of the official evaluations of retrieval: photos of their own shapes, and squares."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, UInt8
from PIL import Image
from tqdm import tqdm

from dinojax.embedding import default_batch
from dinojax.heads.resize import resize_bilinear
from dinojax.images import normalize
from dinojax.images.decode import decode_rgb
from dinojax.images.resize import Resampling, resize_square
from dinojax.models.vit import VisionTransformer
from dinojax.precision import matmul_precision
from dinojax.retrieval import copy_features

_SCALES = (1.0, 1 / 2**0.5, 1 / 2)


def landmark_features(
    model: VisionTransformer, files: Sequence[Path], *, image_size: int, multiscale: bool, title: str
) -> Float32[np.ndarray, "images dim"]:
    """Class tokens of whole photos, whose longer side is at most `image_size` px (Lanczos, aspect kept).

    Sides are cut at the right and the bottom to whole patches, as DINO's patch embedding does. Images of one size go
    through the model together, and it is compiled once for each size.

    Args:
        model: with its preprocessing.
        files: of the photos.
        image_size: most pixels of a side.
        multiscale: the mean of the class tokens at 1, 1/√2 and 1/2 of the size, as upstream's `multi_scale`.
        title: of the progress bar.

    Raises:
        UserError: a photo that cannot be read.
    """
    graphdef, state = nnx.split(model)
    features = np.zeros((len(files), model.config.embed_dim), np.float32)
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}

    def compute(shape: tuple[int, ...]) -> None:
        rows, photos = zip(*waiting.pop(shape))
        batch = np.stack([*photos, *[photos[-1]] * (_batch(model, shape) - len(photos))])
        found = _class_tokens(graphdef, state, batch, _SCALES if multiscale else (1.0,))
        features[list(rows)] = np.asarray(found)[: len(rows)]

    for row, file in enumerate(tqdm(files, desc=title, unit="img", dynamic_ncols=True)):
        pixels = thumbnail(decode_rgb(file, str(file)), image_size)
        waiting.setdefault(pixels.shape, []).append((row, pixels))
        if len(waiting[pixels.shape]) == _batch(model, pixels.shape):
            compute(pixels.shape)
    for shape in list(waiting):
        compute(shape)
    return features


def copy_detection_features(
    model: VisionTransformer, files: Sequence[Path], *, image_size: int, title: str
) -> Float32[np.ndarray, "images two_dims"]:
    """The class token and GeM-pooled patches of photos that are resized to squares (bicubic, aspect not kept).

    Raises:
        UserError: a photo that cannot be read.
    """
    graphdef, state = nnx.split(model)
    size, found = min(_batch(model, (image_size, image_size, 3)), len(files)), []
    for start in tqdm(range(0, len(files), size), desc=title, unit="batch", dynamic_ncols=True, disable=not files):
        some = files[start : start + size]
        squares = [resize_square(decode_rgb(f, str(f)), image_size, resample=Resampling.BICUBIC) for f in some]
        batch = np.stack([*squares, *[squares[-1]] * (size - len(squares))])
        found.append(np.asarray(_copy_features(graphdef, state, batch))[: len(some)])
    return np.concatenate(found)


def thumbnail(
    pixels: UInt8[np.ndarray, "height width 3"], image_size: int
) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """The photo with sides of at most `image_size` px; smaller ones stay as they are. Source: Pillow `thumbnail`."""
    image = Image.fromarray(pixels)
    image.thumbnail((image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _batch(model: VisionTransformer, shape: tuple[int, ...]) -> int:
    return min(32, default_batch(model, (1, *shape)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _class_tokens(
    graphdef: nnx.GraphDef, state: Any, pixels: UInt8[Array, "batch height width 3"], scales: tuple[float, ...]
) -> Float[Array, "batch dim"]:
    model = nnx.merge(graphdef, state)
    images = normalize(pixels, model.preprocessing)
    total = jnp.zeros((len(images), model.config.embed_dim))
    with jax.default_matmul_precision(matmul_precision(model.cls_token[...].dtype)):
        for scale in scales:
            size = tuple(int(scale * side) for side in images.shape[1:3])
            resized = resize_bilinear(images, size, align_corners=False, scale=scale)
            rows, columns = (side // model.config.patch_size * model.config.patch_size for side in size)
            # DINO's positions follow the number of patches, so that cutting beforehand changes nothing for it.
            total += model(resized[:, :rows, :columns]).cls_token
    return total / len(scales)


@functools.partial(jax.jit, static_argnums=0)
def _copy_features(
    graphdef: nnx.GraphDef, state: Any, pixels: UInt8[Array, "batch side side 3"]
) -> Float[Array, "batch two_dims"]:
    model = nnx.merge(graphdef, state)
    with jax.default_matmul_precision(matmul_precision(model.cls_token[...].dtype)):
        features = model(normalize(pixels, model.preprocessing))
    return copy_features(features.cls_token, features.patch_tokens)
