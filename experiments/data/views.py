"""Random views of images as splits of their own, so that their features are cached like any others."""

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from dinojax.images.decode import Pixels
from experiments.data.splits import Split

SCALE = (0.6, 1.0)  # share of the image's area
RATIO = (3 / 4, 4 / 3)  # width over height
_TRIES = 10


def augmented(split: Split, view: int, size: int) -> Split:
    """A random view of each image: cropped, resized to `size` × `size` px (bicubic), and flipped half of the time.

    Crops and flips follow from the image's index and `view` alone, so they are the same in every run.
    """

    def read(index: int) -> Pixels:
        return _random_view(split.read(index), size, np.random.default_rng((view, index)))

    recipe = f"view {view}: crop {SCALE} {RATIO}, {size} px bicubic, flip"
    return dataclasses.replace(split.changed(read, recipe), name=f"{split.name} view {view}")


def _random_view(pixels: Pixels, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "size size 3"]:
    height, width = pixels.shape[:2]
    crop_height, crop_width = _crop_size(height, width, rng)
    top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
    box = (left, top, left + crop_width, top + crop_height)
    image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=tuple(map(float, box)))
    return np.asarray(ImageOps.mirror(image) if rng.random() < 0.5 else image)


def _crop_size(height: int, width: int, rng: np.random.Generator) -> tuple[int, int]:
    """Height and width: area and ratio are drawn until the crop fits; after ten tries it is as large as possible.

    Source: torchvision `RandomResizedCrop.get_params`.
    """
    for _ in range(_TRIES):
        area = height * width * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(*map(math.log, RATIO)))
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            return crop_height, crop_width
    return min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
