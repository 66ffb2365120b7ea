"""From photos to the arrays that a model takes.

    images = dinojax.preprocess(["a.jpg", "b.jpg"], model)      # float32 [2, 224, 224, 3]
    features = model(images)

A model carries its `Preprocessing`: mean and standard deviation, size, interpolation. `dinojax.save` stores it.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32
from PIL import Image

from dinojax.errors import UserError
from dinojax.images.decode import decode_rgb, one_large_image, to_rgb
from dinojax.images.resize import Pixels, Resampling, resize_centre_crop, resize_to_multiple
from dinojax.models.preprocessing import LARGEST_SIDE, Preprocessing
from dinojax.precision import at_least_float32


@runtime_checkable
class HasPreprocessing(Protocol):
    """A model that carries its preprocessing."""

    preprocessing: Preprocessing


Photo = str | Path | Image.Image | np.ndarray | Array


def preprocess(
    images: Photo | Iterable,
    model: HasPreprocessing | Preprocessing | None = None,
    *,
    size: int | None = 224,
    crop: bool = True,
) -> Float32[np.ndarray, "batch height width channels"]:
    """Photos as a batch that a model takes: RGB, resized, normalised.

    Args:
        images: a path, a Pillow image of any mode, or an array; or several of them, in a list or a generator. Arrays
            are uint8 (0–255) or floats (0–1), "height width", "height width channels" or "batch height width channels".
        model: whose `preprocessing` is used, or a `Preprocessing`; None stands for DINOv2's.
        size: side in pixels of the images; None takes that of the preprocessing.
        crop: as in the official evaluations, the shorter side is resized to `size`, then the central square is cut out.
            False keeps the whole image and its aspect: the shorter side becomes `size`, and both are rounded to whole
            patches. Use it for attention maps and dense features.

    Returns:
        float32; "batch size size channels" if `crop`.

    Raises:
        UserError: a file that is not a readable image, an array of another type, shape or range, no images at all, or
            whole images of several sizes.

    Source: facebookresearch/dinov2 b8931f7 `dinov2/data/transforms.py`, `make_classification_eval_transform`.
    """
    spec = _spec(model)
    side = spec.image_size if size is None else size
    if not isinstance(side, int) or isinstance(side, bool) or not 0 < side <= LARGEST_SIDE:
        raise UserError(f"size={size!r} is not a whole number of pixels from 1 to {LARGEST_SIDE}")
    if len(spec.mean) != 3:
        raise UserError(f"the model takes {len(spec.mean)} channels, and photos have 3: prepare its images by hand")

    resample = getattr(Resampling, spec.interpolation.upper())

    def prepare(photo: tuple[int, Any]) -> Pixels:
        with one_large_image():
            pixels = _pixels(photo[1], f"image {photo[0]}")
            if crop:
                return resize_centre_crop(pixels, side, side, resample=resample)
            return resize_to_multiple(pixels, side, spec.patch_size, resample=resample)

    with ThreadPoolExecutor(thread_name_prefix="preprocess") as pool:
        prepared = list(pool.map(prepare, enumerate(_one_by_one(images))))
    shapes = sorted({pixels.shape[:2] for pixels in prepared})
    if not prepared:
        raise UserError("there are no images to preprocess; pass one or more")
    if len(shapes) > 1:
        shown = " and ".join(f"{width}×{height}" for height, width in shapes[:2])
        raise UserError(f"with crop=False the images have several sizes ({shown} px); pass them one at a time")
    if len({pixels.dtype for pixels in prepared}) > 1:  # photos, and arrays of floats
        prepared = [x.astype(np.float32) / 255 if x.dtype == np.uint8 else x for x in prepared]
    return np.array(normalize(np.stack(prepared), spec))


def normalize(
    images: Array | np.ndarray, model: HasPreprocessing | Preprocessing | None = None
) -> Float[Array, "batch height width channels"]:
    """Resized images as a model takes them, for use inside jit; see `preprocess` for photos.

    Args:
        images: uint8 (0–255) or floats (0–1) "batch height width channels"; their range is not checked.
        model: whose mean and standard deviation are used, or a `Preprocessing`; None stands for DINOv2's.

    Raises:
        UserError: an array of another type or shape.
    """
    spec = _spec(model)
    if images.ndim != 4 or images.shape[-1] != len(spec.mean):
        raise UserError(
            f"images of shape {tuple(images.shape)} cannot be normalised; expected are batch, height, width and "
            f"{len(spec.mean)} channels"
        )
    if images.dtype == np.uint8:
        images = jnp.asarray(images, jnp.float32) / 255
    elif not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images of {images.dtype} cannot be normalised; pass uint8 (0–255) or floats (0–1)")
    dtype = at_least_float32(images.dtype)
    mean, std = (jnp.asarray(values, dtype)[None, None, None] for values in (spec.mean, spec.std))
    return (jnp.asarray(images, dtype) - mean) / std


def _spec(model: HasPreprocessing | Preprocessing | None) -> Preprocessing:
    if model is None:
        return Preprocessing()
    found = model if isinstance(model, Preprocessing) else getattr(model, "preprocessing", None)
    if not isinstance(found, Preprocessing):
        raise UserError(f"{type(model).__name__} has no preprocessing; pass a model or dinojax.Preprocessing(…)")
    return found


def _one_by_one(images: Photo | Iterable) -> Iterable:
    if isinstance(images, str | Path | Image.Image):
        return [images]
    if isinstance(images, np.ndarray | jax.Array):
        array = np.asarray(images)
        return list(array) if array.ndim == 4 else [array]
    return images


def _pixels(photo: Any, name: str) -> Pixels:
    if isinstance(photo, str | Path):
        return decode_rgb(Path(photo).expanduser(), str(photo))
    if isinstance(photo, Image.Image):
        return to_rgb(photo, name)
    if isinstance(photo, np.ndarray | jax.Array):
        return _checked(np.asarray(photo), name)
    raise UserError(f"{name} is a {type(photo).__name__}; pass a path, a Pillow image or an array")


def _checked(array: np.ndarray, name: str) -> Pixels:
    """An array "height width channels" of 3 channels; uint8, or float32 between 0 and 1."""
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        hint = "transpose(1, 2, 0) moves the channels to the end" if first else "the channels must be 1, 3 or 4"
        raise UserError(f"{name} has the shape {array.shape}, not height, width, channels; {hint}")
    array = np.broadcast_to(array, (*array.shape[:2], 3)) if array.shape[-1] == 1 else array[..., :3]
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{name} has pixels of {array.dtype}; pass uint8 (0–255) or floats (0–1)")
    array = np.ascontiguousarray(array, np.float32)
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 1):  # also where they are not numbers
        raise UserError(
            f"{name} has floats from {low:g} to {high:g}, not from 0 to 1: divide 0–255 by 255; what is normalised "
            "already goes to the model directly"
        )
    return array
