"""DINO's augmentation on Pillow alone, one image after another on one thread: what a worker of a data loader would run.

The operations are the Pillow calls that torchvision's transforms make, without what torchvision adds around them.

Source: facebookresearch/dino 7c446df `main_dino.DataAugmentationDINO`; torchvision `RandomResizedCrop`, `ColorJitter`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from benchmarks.work.dino_work import GLOBAL_CROPS, LOCAL_CROPS, ROWS, pictures
from benchmarks.work.paired import Prepared, warmed_up

GLOBAL_SCALE, LOCAL_SCALE, RATIO = (0.4, 1.0), (0.05, 0.4), (3 / 4, 4 / 3)
JITTER = (0.4, 0.4, 0.2, 0.1)
BLUR_PROBABILITIES = (1.0, 0.1) + (0.5,) * LOCAL_CROPS
SOLARIZE_PROBABILITIES = (0.0, 0.2) + (0.0,) * LOCAL_CROPS
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
# Of 0 to 255, on average: both sides round to 8 bits at every operation, and a hue or a blur may round the other way.
MEAN_BOUND = 0.01


class View(NamedTuple):
    """What one crop is made with; the names and meanings of `dinojax.pretraining.augment.Views`."""

    box: tuple[int, int, int, int]
    flip: bool
    jitter: bool
    factors: tuple[float, float, float, float]
    order: tuple[int, ...]
    grayscale: bool
    blur: bool
    radius: float
    solarize: bool


def draw_view(random: Random, side: int, crop: int) -> View:
    """Draws what crop number `crop`, the global ones first, of a square image is made with."""
    order = list(range(4))
    random.shuffle(order)
    return View(
        box=_draw_box(random, side, GLOBAL_SCALE if crop < GLOBAL_CROPS else LOCAL_SCALE),
        flip=random.random() < 0.5,
        jitter=random.random() < 0.8,
        factors=tuple(random.uniform(center - s, center + s) for center, s in zip((1, 1, 1, 0), JITTER)),
        order=tuple(order),
        grayscale=random.random() < 0.2,
        blur=random.random() < BLUR_PROBABILITIES[crop],
        radius=random.uniform(0.1, 2.0),
        solarize=random.random() < SOLARIZE_PROBABILITIES[crop],
    )


def _draw_box(random: Random, side: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height, width."""
    for _ in range(10):
        area = side * side * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= side and 0 < height <= side:
            return random.randint(0, side - height), random.randint(0, side - width), height, width
    return 0, 0, side, side


def make_crop(image: Image.Image, view: View, size: int) -> np.ndarray:
    """One crop of an image, normalised: float32[size, size, 3]."""
    top, left, height, width = view.box
    image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if view.jitter:
        image = _jitter(image, view)
    if view.grayscale:
        image = image.convert("L").convert("RGB")
    if view.blur:
        image = image.filter(ImageFilter.GaussianBlur(view.radius))
    if view.solarize:
        image = ImageOps.solarize(image, 128)
    return (np.asarray(image, np.float32) / 255 - MEAN) / STD


def _jitter(image: Image.Image, view: View) -> Image.Image:
    enhance = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for which in view.order:
        factor = view.factors[which]
        image = _turn_hue(image, factor) if which == 3 else enhance[which](image).enhance(factor)
    return image


def _turn_hue(image: Image.Image, factor: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    shift = int(factor * 255)
    turned = hue.point([(angle + shift) % 256 for angle in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def multi_crop(random: Random, images: np.ndarray, global_size: int, local_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Global crops [2, batch, …] and local crops [8, batch, …] of uint8[batch, side, side, 3], each NHWC."""
    batch, side = images.shape[:2]
    sizes = [global_size] * GLOBAL_CROPS + [local_size] * LOCAL_CROPS
    globals_ = np.empty((GLOBAL_CROPS, batch, global_size, global_size, 3), np.float32)
    locals_ = np.empty((LOCAL_CROPS, batch, local_size, local_size, 3), np.float32)
    targets = [*globals_, *locals_]
    for index, pixels in enumerate(images):
        image = Image.fromarray(pixels)
        for crop, (target, size) in enumerate(zip(targets, sizes)):
            target[index] = make_crop(image, draw_view(random, side, crop), size)
    return globals_, locals_


def repeat(images: np.ndarray, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Makes the crops that ours drew, and says how far they are from ours, in values of 0 to 255.

    Args:
        images: the source of the crops.
        arrays: our "global_crops" and "local_crops", and every field of their views under "global_…" and "local_…".

    Raises:
        RuntimeError: further apart than rounding explains, so the work is not the same.
    """
    distances = []
    for kind in ("global", "local"):
        ours = arrays[f"{kind}_crops"]
        fields = [arrays[f"{kind}_{name}"].tolist() for name in View._fields]
        for crop, index in np.ndindex(ours.shape[:2]):
            view = View(*(field[crop][index] for field in fields))
            theirs = make_crop(Image.fromarray(images[index]), view, ours.shape[2])
            distances.append((np.abs(ours[crop, index] - theirs) * STD * 255).ravel())
    apart = np.concatenate(distances)
    found = {
        "mean_difference": float(f"{apart.mean():.1e}"),
        "share_within_1": round(float((apart < 1.01).mean()), 5),
        "largest_difference": round(float(apart.max()), 1),
    }
    if not found["mean_difference"] <= MEAN_BOUND:
        raise RuntimeError(f"the work differs: crops of the same views are apart by {found} of 255")
    return found


def prepare(row: str, start: str) -> Prepared:
    """Pillow's side; first it repeats what our side wrote to the folder `start`."""
    work = ROWS[row]
    images, random = pictures(work.batch, work.source), Random(0)
    with np.load(Path(start) / "crops.npz") as arrays:
        same = repeat(images, arrays)
    return warmed_up(lambda: multi_crop(random, images, work.global_size, work.local_size), same_work=same)
