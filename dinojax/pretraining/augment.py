"""DINO's multi-crop: what is drawn for each view of an image, and the views themselves, inside one compiled program.

Source: facebookresearch/dino 7c446df `main_dino.DataAugmentationDINO`, facebookresearch/dinov2 b8931f7
`dinov2/data/augmentations.py`, `transforms.py`; torchvision `RandomResizedCrop`, `ColorJitter`.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from dinojax import image_ops as ops
from dinojax.errors import require

Range = tuple[float, float]
Triple = tuple[float, float, float]
Mode = Literal["v1", "v2_paper", "v2_as_released"]

_ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)
_CROP_TRIES = 10
_KERNEL_SIZE = 9


@dataclass(frozen=True)
class MultiCropConfig:
    """Sizes, counts and probabilities of the views; the defaults are DINO's for ImageNet."""

    global_size: int = 224
    """Side of a global crop in pixels."""
    local_size: int = 96
    """Side of a local crop in pixels."""
    global_crops: int = 2
    """Global crops per image; those after the first are all drawn as DINO's second."""
    local_crops: int = 8
    """Local crops per image."""
    global_scale: Range = (0.4, 1.0)
    """Share of the image's area that a global crop covers, least and most (DINOv2: 0.32 1.0)."""
    local_scale: Range = (0.05, 0.4)
    """Share of the image's area that a local crop covers, least and most (DINOv2: 0.05 0.32)."""
    ratio: Range = (3 / 4, 4 / 3)
    """Width over height of a crop before resizing, least and most."""
    flip_probability: float = 0.5
    """How often a view is mirrored left to right."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation (factors 1 ± strength) and hue (turns, at most 0.5)."""
    jitter_probability: float = 0.8
    """How often the colours are jittered."""
    grayscale_probability: float = 0.2
    """How often a view loses its colours."""
    blur_probabilities: Triple = (1.0, 0.1, 0.5)
    """How often the first global, the other global and the local crops are blurred."""
    blur_radius: Range = (0.1, 2.0)
    """Standard deviation of the blur in pixels, least and most."""
    solarize_probability: float = 0.2
    """How often values of 128 and above are inverted, in the global crops after the first."""
    mean: Triple = (0.485, 0.456, 0.406)
    """Subtracted from red, green and blue on a scale of 0 to 1."""
    std: Triple = (0.229, 0.224, 0.225)
    """What they are divided by then."""
    mode: Mode = "v1"
    """v1: Pillow's blur. v2: a 9-pixel kernel; as released, DINOv2 blurs with one minus each probability."""

    def __post_init__(self):
        modes = get_args(Mode)
        require(self.mode in modes, "mode", self.mode, "one of " + ", ".join(modes))
        for name in ("global_size", "local_size", "global_crops"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.local_crops >= 0, "local_crops", self.local_crops, "0 or more")
        if self.mode != "v1":
            size = min(self.global_size, self.local_size if self.local_crops else self.global_size)
            require(size > _KERNEL_SIZE // 2, "crop size", size, f"5 or more for the blur of mode {self.mode}")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            require(0 < low <= high <= 1, name, (low, high), "two numbers within 0 to 1, the smaller first")
        for name in ("ratio", "blur_radius"):
            low, high = getattr(self, name)
            require(0 < low <= high < math.inf, name, (low, high), "two positive numbers, the smaller first")
        names = ("flip_probability", "jitter_probability", "grayscale_probability", "solarize_probability")
        for name, value in [(n, getattr(self, n)) for n in names] + [("blur", p) for p in self.blur_probabilities]:
            require(0 <= value <= 1, name, value, "a probability of 0 to 1")
        fits = min(self.jitter) >= 0 and self.jitter[3] <= 0.5
        require(fits, "jitter", self.jitter, "four numbers of 0 or more, the last at most 0.5")
        require(min(self.std) > 0, "std", self.std, "above 0")


class Views(NamedTuple):
    """What one view of each image is made with, in the order of application."""

    box: Int[Array, "*views 4"]
    """Top, left, height and width in whole pixels."""
    flip: Bool[Array, "*views"]
    jitter: Bool[Array, "*views"]
    """Whether the colours are jittered at all."""
    factors: Float[Array, "*views 4"]
    """Of brightness, contrast, saturation and hue."""
    order: Int[Array, "*views 4"]
    """In which 0 brightness, 1 contrast, 2 saturation and 3 hue follow each other."""
    grayscale: Bool[Array, "*views"]
    blur: Bool[Array, "*views"]
    radius: Float[Array, "*views"]
    """Standard deviation of the blur in pixels."""
    solarize: Bool[Array, "*views"]


def draw_box(
    key: Key[Array, ""], height: int, width: int, scale: Range | Float[Array, "2"], ratio: Range
) -> Int[Array, "4"]:
    """Top, left, height and width of a random crop of an image of `height` × `width` pixels.

    Ten tries of a uniform area and a log-uniform aspect ratio; when none fits, the largest central crop within `ratio`.

    Source: torchvision `RandomResizedCrop.get_params`.
    """
    # Every function here draws its numbers at once: generators are most of what there is to compile.
    draws = jax.random.uniform(key, (2 * _CROP_TRIES + 2,))
    area = height * width * (scale[0] + draws[:_CROP_TRIES] * (scale[1] - scale[0]))
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = jnp.exp(log_low + draws[_CROP_TRIES:-2] * (log_high - log_low))
    widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = jnp.argmax(fits)
    crop_height, crop_width = heights[first], widths[first]
    top = _whole_number(draws[-2], height - crop_height + 1)
    left = _whole_number(draws[-1], width - crop_width + 1)
    drawn = jnp.stack([top, left, crop_height, crop_width])
    return jnp.where(fits.any(), drawn, jnp.array(_central_box(height, width, ratio), jnp.int32))


def _whole_number(uniform: Array, count: Array | int) -> Array:
    """One of 0 to count − 1 from a number of [0, 1)."""
    return jnp.floor(uniform * count).astype(jnp.int32)


def _central_box(height: int, width: int, ratio: Range) -> tuple[int, int, int, int]:
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def draw_jitter(
    key: Key[Array, ""], strength: tuple[float, float, float, float]
) -> tuple[Float[Array, "4"], Int[Array, "4"]]:
    """Uniform factors of brightness, contrast, saturation and hue, and a uniform permutation: the order of the four.

    Source: torchvision `ColorJitter.get_params`.
    """
    draws = jax.random.uniform(key, (5,))
    center, spread = jnp.array([1, 1, 1, 0], jnp.float32), jnp.array(strength, jnp.float32)
    low = jnp.maximum(center - spread, jnp.array([0, 0, 0, -0.5]))
    factors = low + draws[:4] * (center + spread - low)
    return factors, jnp.array(_ORDERS)[_whole_number(draws[4], len(_ORDERS))]


def view_chances(crop: int, config: MultiCropConfig) -> tuple[float, float, float, float, float]:
    """Probabilities of flip, jitter, grayscale, blur and solarize for crop 0 (global), 1, … (the local crops last)."""
    later_global = 0 < crop < config.global_crops
    blur = config.blur_probabilities[0 if crop == 0 else 1 if later_global else 2]
    return (
        config.flip_probability,
        config.jitter_probability,
        config.grayscale_probability,
        1 - blur if config.mode == "v2_as_released" else blur,
        config.solarize_probability if later_global else 0.0,
    )


def draw_view(
    key: Key[Array, ""],
    height: int,
    width: int,
    scale: Range | Float[Array, "2"],
    chances: Float[Array, "5"],
    config: MultiCropConfig,
) -> Views:
    """Everything drawn for one view of one image; `chances` as `view_chances` gives them."""
    box_key, jitter_key, chance_key = jax.random.split(key, 3)
    draws = jax.random.uniform(chance_key, (6,))
    flip, jitter, grayscale, blur, solarize = draws[:5] < chances
    factors, order = draw_jitter(jitter_key, config.jitter)
    low, high = config.blur_radius
    return Views(
        box=draw_box(box_key, height, width, scale, config.ratio),
        flip=flip,
        jitter=jitter,
        factors=factors,
        order=order,
        grayscale=grayscale,
        blur=blur,
        radius=low + draws[5] * (high - low),
        solarize=solarize,
    )


def draw_views(
    key: Key[Array, ""], ids: Int[Array, " batch"], height: int, width: int, config: MultiCropConfig
) -> tuple[Views, Views]:
    """What the global and the local crops are made with, each [crops, batch].

    Crop c of image i draws from `fold_in(fold_in(key, i), c)`, the local crops counted after the global ones.
    """
    split, total = config.global_crops, config.global_crops + config.local_crops
    scales = jnp.array([config.global_scale] * split + [config.local_scale] * config.local_crops, jnp.float32)
    chances = jnp.array([view_chances(crop, config) for crop in range(total)], jnp.float32)

    def draw(image: Array, crop: Array, scale: Array, chances: Array) -> Views:
        view_key = jax.random.fold_in(jax.random.fold_in(key, image), crop)
        return draw_view(view_key, height, width, scale, chances, config)

    over_images = jax.vmap(draw, in_axes=(0, None, None, None))
    views = jax.vmap(over_images, in_axes=(None, 0, 0, 0))(ids, jnp.arange(total), scales, chances)
    return jax.tree.map(lambda x: x[:split], views), jax.tree.map(lambda x: x[split:], views)


def apply_views(
    planes: Float[Array, "batch height 3 width"], views: Views, size: int, config: MultiCropConfig
) -> Float[Array, "batch {size} {size} 3"]:
    """One view of each image (`views` over [batch]), normalised, NHWC."""

    def where(chosen: Array, then: Array, otherwise: Array) -> Array:
        return jnp.where(chosen[:, None, None, None], then, otherwise)

    x = ops.crop_resize(planes, views.box, size, views.flip)
    x = where(views.jitter, ops.color_jitter(x, views.factors, views.order), x)
    x = where(views.grayscale, ops.grayscale(x), x)
    if config.mode == "v1":
        blurred = ops.box_gaussian_blur(x, views.radius, config.blur_radius[1])
    else:
        blurred = ops.kernel_gaussian_blur(x, views.radius, _KERNEL_SIZE)
    x = where(views.blur, blurred, x)
    x = where(views.solarize, ops.solarize(x), x)
    return ops.normalize(x, config.mean, config.std)


def multi_crop(
    key: Key[Array, ""],
    images: UInt8[Array | np.ndarray, "batch height width 3"],
    config: MultiCropConfig,
    ids: Int[Array | np.ndarray, " batch"] | None = None,
) -> tuple[Float[Array, "globals batch gsize gsize 3"], Float[Array, "locals batch lsize lsize 3"]]:
    """The global and the local crops of each image, normalised.

    Args:
        key: of this epoch; with the same key an image always gets the same views.
        images: RGB, all of one size.
        config: sizes, counts and probabilities.
        ids: what tells the images apart, whatever the batch or device they are in; their places in the batch if
            omitted.

    Source: facebookresearch/dino 7c446df `DataAugmentationDINO.__call__`.
    """
    batch, height, width, _ = images.shape
    ids = jnp.arange(batch, dtype=jnp.int32) if ids is None else jnp.asarray(ids, jnp.int32)
    planes = ops.to_planes(jnp.asarray(images))
    global_views, local_views = draw_views(key, ids, height, width, config)

    def crops(views: Views, size: int) -> Array:
        # One crop after another: a fraction of the memory, and one body to compile for all crops of a size.
        return jax.lax.map(lambda view: apply_views(planes, view, size, config), views)

    return crops(global_views, config.global_size), crops(local_views, config.local_size)
