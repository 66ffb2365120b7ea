"""DINO's multi-crop: draws the parameters of each view of an image and computes the views, in one compiled program.

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
    """Number of global crops per image; all after the first are drawn like DINO's second."""
    local_crops: int = 8
    """Number of local crops per image."""
    global_scale: Range = (0.4, 1.0)
    """Smallest and largest share of the image area that a global crop covers (DINOv2: 0.32 1.0)."""
    local_scale: Range = (0.05, 0.4)
    """Smallest and largest share of the image area that a local crop covers (DINOv2: 0.05 0.32)."""
    ratio: Range = (3 / 4, 4 / 3)
    """Smallest and largest ratio of width to height of a crop before resizing."""
    flip_probability: float = 0.5
    """Probability that a view is mirrored left to right."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strength of the jitter of brightness, contrast and saturation (factors 1 ± strength) and of hue (in turns, at
    most 0.5)."""
    jitter_probability: float = 0.8
    """Probability that the colours of a view are jittered."""
    grayscale_probability: float = 0.2
    """Probability that a view becomes gray."""
    blur_probabilities: Triple = (1.0, 0.1, 0.5)
    """Probability of blur in the first global crop, the other global crops and the local crops."""
    blur_radius: Range = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur in pixels."""
    solarize_probability: float = 0.2
    """Probability of solarization (values of 128 and above are inverted) in the global crops after the first."""
    mean: Triple = (0.485, 0.456, 0.406)
    """Mean of red, green and blue that normalisation subtracts, on a scale of 0 to 1."""
    std: Triple = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue that normalisation divides by, on a scale of 0 to 1."""
    mode: Mode | None = None
    """Kind of blur: v1 is DINO's, which is Pillow's; v2_paper is DINOv2's, with a 9-pixel kernel; v2_as_released has it
    too, and blurs with one minus each probability, as DINOv2's released code does. None takes v2_paper in a training by
    --method dinov2, and v1 otherwise."""

    def __post_init__(self):
        modes = get_args(Mode)
        require(self.mode in (None, *modes), "mode", self.mode, "one of " + ", ".join(modes))
        for name in ("global_size", "local_size", "global_crops"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.local_crops >= 0, "local_crops", self.local_crops, "0 or more")
        if self.mode not in (None, "v1"):
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
    """The parameters of one view of each image, in the order of application."""

    box: Int[Array, "*views 4"]
    """Top, left, height and width of the crop in whole pixels."""
    flip: Bool[Array, "*views"]
    """Whether the crop is mirrored."""
    jitter: Bool[Array, "*views"]
    """Whether the colours are jittered."""
    factors: Float[Array, "*views 4"]
    """Factors of brightness, contrast, saturation and hue."""
    order: Int[Array, "*views 4"]
    """Order of the four: a permutation of 0 brightness, 1 contrast, 2 saturation and 3 hue."""
    grayscale: Bool[Array, "*views"]
    """Whether the view becomes gray."""
    blur: Bool[Array, "*views"]
    """Whether the view is blurred."""
    radius: Float[Array, "*views"]
    """Standard deviation of the blur in pixels."""
    solarize: Bool[Array, "*views"]
    """Whether the view is solarized."""


def draw_box(
    key: Key[Array, ""], height: int, width: int, scale: Range | Float[Array, "2"], ratio: Range
) -> Int[Array, "4"]:
    """Top, left, height and width of a random crop of an image of `height` × `width` pixels.

    Area and logarithm of the aspect ratio are uniform. If none of ten draws fits into the image, the box is the largest
    central crop within `ratio`.

    Source: torchvision `RandomResizedCrop.get_params`.
    """
    # Every function here draws all its numbers in one call, because random generators dominate the compile time; in
    # float32, so that a view is the same where jax computes in 64 bits.
    draws = jax.random.uniform(key, (2 * _CROP_TRIES + 2,), jnp.float32)
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
    """A whole number from 0 to count − 1, from a uniform number in [0, 1)."""
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
    """Uniform factors of brightness, contrast, saturation and hue, and a random order of the four.

    Source: torchvision `ColorJitter.get_params`.
    """
    draws = jax.random.uniform(key, (5,), jnp.float32)
    center, spread = jnp.array([1, 1, 1, 0], jnp.float32), jnp.array(strength, jnp.float32)
    low = jnp.maximum(center - spread, jnp.array([0, 0, 0, -0.5], jnp.float32))
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
    """The parameters of one view of one image; `chances` are from `view_chances`."""
    box_key, jitter_key, chance_key = jax.random.split(key, 3)
    draws = jax.random.uniform(chance_key, (6,), jnp.float32)
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
    """The parameters of the global crops and of the local crops, each [crops, batch].

    Crop c of image i draws from `fold_in(fold_in(key, i), c)`; the local crops are numbered after the global ones.
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
    """One normalised view of each image, NHWC; the arrays of `views` have the shape [batch, …]."""

    def where(chosen: Array, then: Array, otherwise: Array) -> Array:
        return jnp.where(chosen[:, None, None, None], then, otherwise)

    x = ops.crop_resize(planes, views.box, size, views.flip)
    x = where(views.jitter, ops.color_jitter(x, views.factors, views.order), x)
    x = where(views.grayscale, ops.grayscale(x), x)
    if _blurs(config):
        x = where(views.blur, _blurred(x, views.radius, config), x)
    x = where(views.solarize, ops.solarize(x), x)
    return ops.normalize(x, config.mean, config.std)


def _blurs(config: MultiCropConfig) -> bool:
    """Whether any view may be blurred: without a chance of it, no time is spent on it."""
    crops = range(config.global_crops + config.local_crops)
    return any(view_chances(crop, config)[3] > 0 for crop in crops)


def _blurred(planes: Array, radius: Array, config: MultiCropConfig) -> Array:
    if config.mode in (None, "v1"):
        return ops.box_gaussian_blur(planes, radius, config.blur_radius[1])
    return ops.kernel_gaussian_blur(planes, radius, _KERNEL_SIZE)


def multi_crop(
    key: Key[Array, ""],
    images: UInt8[Array | np.ndarray, "batch height width 3"],
    config: MultiCropConfig,
    ids: Int[Array | np.ndarray, " batch"] | None = None,
) -> tuple[Float[Array, "globals batch gsize gsize 3"], Float[Array, "locals batch lsize lsize 3"]]:
    """The global and the local crops of each image, normalised.

    Args:
        key: the key of this epoch; with the same key an image always gets the same views.
        images: RGB images.
        config: sizes, counts and probabilities.
        ids: a number for each image, independent of its batch and device; None numbers the images of the batch.

    Source: facebookresearch/dino 7c446df `DataAugmentationDINO.__call__`.
    """
    batch, height, width, _ = images.shape
    ids = jnp.arange(batch, dtype=jnp.int32) if ids is None else jnp.asarray(ids, jnp.int32)
    planes = ops.to_planes(jnp.asarray(images))
    global_views, local_views = draw_views(key, ids, height, width, config)

    def crops(views: Views, size: int) -> Array:
        # One crop at a time takes a fraction of the memory, and all crops of one size share one compiled body.
        return jax.lax.map(lambda view: apply_views(planes, view, size, config), views)

    return crops(global_views, config.global_size), crops(local_views, config.local_size)
