"""Image operations with given parameters, each equal to Pillow's on an 8-bit image.

All take `planes`, float32[batch, height, 3, width] with whole numbers from 0 to 255 in RGB order, and one parameter per
image. Results are rounded wherever Pillow stores 8 bits. In this layout both passes of a resize are plain matrix
products, and each colour plane is contiguous along a row.

Source: Pillow 13 `Resample.c`, `Blend.c`, `Convert.c`, `BoxBlur.c`, `ImageEnhance.py`, `ImageOps.py`; torchvision
`transforms/_functional_pil.py`, `_functional_tensor.py`.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

Planes = Float[Array, "batch height 3 width"]
Factor = Float[Array, " batch"]
Interpolation = Literal["bilinear", "bicubic"]


def to_planes(images: UInt8[Array, "batch height width 3"]) -> Planes:
    """Converts NHWC images to planes, the input of all operations here."""
    return images.transpose(0, 1, 3, 2).astype(jnp.float32)


def crop_resize(
    planes: Planes,
    boxes: Int[Array, "batch 4"],
    size: int,
    flip: Bool[Array, " batch"] | None = None,
    *,
    interpolation: Interpolation = "bicubic",
    eight_bit: bool = True,
) -> Float[Array, "batch {size} 3 {size}"]:
    """Crops, resizes to size × size (antialiased) and mirrors left to right where `flip` says so.

    Args:
        planes: the images.
        boxes: top, left, height and width of each crop in whole pixels, inside the image.
        size: side of the result in pixels.
        flip: which results to mirror; None mirrors none.
        interpolation: the filter.
        eight_bit: round and clip after each pass, as Pillow does for 8-bit images; otherwise as for its mode F.

    Source: torchvision `resized_crop`, `hflip`; Pillow `Resample.c`.
    """
    top, left, height, width = boxes.T
    extent = max(planes.shape[1], planes.shape[3])
    rows = _weights(top, height, size, extent, interpolation)
    columns = _weights(left, width, size, extent, interpolation)
    if flip is not None:
        columns = jnp.where(_per_image(flip, 3), columns[:, ::-1], columns)
    # Pillow 13 takes the vertical pass first where it shrinks the height by more than twice what the width loses.
    # Rounding in between makes the order visible; transposing those images leaves one order to compute.
    swap = height - size > 2 * jnp.maximum(width - size, 0)
    square = jnp.pad(planes, ((0, 0), (0, extent - planes.shape[1]), (0, 0), (0, extent - planes.shape[3])))
    square = jnp.where(_per_image(swap, 4), square.swapaxes(1, 3), square)
    first = jnp.where(_per_image(swap, 3), rows, columns)
    second = jnp.where(_per_image(swap, 3), columns, rows)
    store = _to_8_bit if eight_bit else lambda x: x
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    half = store(product("bycx,bsx->bycs", square, first))
    full = store(product("bsy,bycx->bscx", second, half))
    return jnp.where(_per_image(swap, 4), full.swapaxes(1, 3), full)


def _weights(start: Array, length: Array, size: int, extent: int, interpolation: Interpolation) -> Array:
    """[batch, size, extent]: weight of each source pixel in a target pixel; rows sum to one, zero outside the box."""
    source = jnp.arange(extent, dtype=jnp.int32)[None, None] - start[:, None, None]
    target = jnp.arange(size, dtype=jnp.int32)[None, :, None]
    length = length[:, None, None]
    # Twice the distance between pixel centres, in units of 1/size: whole numbers, so that only the division rounds.
    apart = jnp.abs((2 * source + 1) * size - (2 * target + 1) * length)
    reach = 2 * jnp.maximum(length, size)
    if interpolation == "bilinear":
        weights = jnp.maximum(reach - apart, 0).astype(jnp.float32)
    else:
        x = apart.astype(jnp.float32) / reach.astype(jnp.float32)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = jnp.where(x < 1, near, jnp.where(x < 2, far, 0))
    weights = jnp.where((source >= 0) & (source < length), weights, 0)
    return weights / weights.sum(-1, keepdims=True)


def luma(planes: Planes) -> Float[Array, "batch height 1 width"]:
    """ITU-R 601 brightness in 8 bits, as Pillow converts RGB to L."""
    red, green, blue = planes[:, :, :1], planes[:, :, 1:2], planes[:, :, 2:]
    # Sums stay below 2²⁴: float32 holds Pillow's integer arithmetic exactly.
    return jnp.floor((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536)


def grayscale(planes: Planes) -> Planes:
    """Replaces all three channels by their `luma`."""
    return jnp.broadcast_to(luma(planes), planes.shape)


def brightness(planes: Planes, factor: Factor) -> Planes:
    """Blends with black: 0 is black, 1 the image. Source: `ImageEnhance.Brightness`."""
    return _blend(0.0, planes, factor)


def contrast(planes: Planes, factor: Factor) -> Planes:
    """Blends with the mean brightness: 0 is plain gray, 1 the image. Source: `ImageEnhance.Contrast`."""
    return _blend(_mean_luma(luma(planes)), planes, factor)


def saturation(planes: Planes, factor: Factor) -> Planes:
    """Blends with the grayscale image: 0 is gray, 1 the image. Source: `ImageEnhance.Color`."""
    return _blend(luma(planes), planes, factor)


def _blend(background: Array | float, planes: Array, factor: Array) -> Array:
    """Pillow's `Image.blend` of 8-bit images, which truncates."""
    return jnp.floor(jnp.clip(background + _per_image(factor, 4) * (planes - background), 0, 255))


def _mean_luma(gray: Array) -> Array:
    """Each image's mean, rounded half up; integer sums are exact up to 2048² pixels."""
    total, count = gray.astype(jnp.int32).sum((1, 2, 3), keepdims=True), gray.shape[1] * gray.shape[3]
    return ((2 * total + count) // (2 * count)).astype(jnp.float32)


def hue(planes: Planes, factor: Factor) -> Planes:
    """Rotates the hue by `factor` of a full circle, −0.5 to 0.5, in Pillow's 8-bit HSV.

    Source: torchvision `_functional_pil.adjust_hue`; Pillow `Convert.c` `rgb2hsv_row`, `hsv2rgb`.
    """
    red, green, blue = planes[:, :, 0], planes[:, :, 1], planes[:, :, 2]
    value, low = planes.max(2), planes.min(2)
    spread = value - low
    middle = red + green + blue - value - low
    lack = (value - middle) / jnp.maximum(spread, 1)
    # One addition each, as in Pillow: the truncation below makes a hue that was rounded twice a whole step smaller.
    sector = jnp.where(
        red == value,
        jnp.where(green >= blue, 1 - lack, lack - 1),
        jnp.where(
            green == value,
            jnp.where(blue >= red, 3 - lack, 1 + lack),
            jnp.where(red >= green, 5 - lack, 3 + lack),
        ),
    )
    turn = _sixth(sector)
    turn = jnp.where(turn < 0, turn + 1, turn)
    angle = _times_255(turn)
    shade = _times_255(spread / jnp.maximum(value, 1))
    # The hue is stored in 8 bits, so the sum wraps at 256 although a full circle is 255.
    angle = angle + jnp.trunc(_per_image(factor, 3) * 255)
    angle = angle - 256 * jnp.floor(angle / 256)
    value, depth, sixths = value[:, :, None], (value * shade / 255)[:, :, None], (angle * (6 / 255))[:, :, None]
    # Distance, in sixths of the circle, that each channel lies from where it is at full value.
    offset = sixths + jnp.array([5, 3, 1], jnp.float32)[None, None, :, None]
    offset = offset - 6 * jnp.floor(offset / 6)
    return jnp.floor(value - depth * jnp.clip(jnp.minimum(offset, 4 - offset), 0, 1) + 0.5)


def _sixth(x: Array) -> Array:
    """x / 6, rounded once: XLA turns the division into a product with 1/6, whose error is corrected here."""
    near = x * (1 / 6)
    return near + ((x - 4 * near) - 2 * near) * (1 / 6)


def _times_255(x: Array) -> Array:
    """⌊255 x⌋ for x of 0 to 1, without float32 rounding the product up: Pillow computes it in double precision."""
    whole = jnp.floor(255 * x)
    return whole - (256 * x - whole < x)


def color_jitter(planes: Planes, factors: Float[Array, "batch 4"], order: Int[Array, "batch 4"]) -> Planes:
    """Jitters brightness, contrast, saturation and hue, in an order for each image.

    Args:
        planes: the images.
        factors: factors of brightness, contrast and saturation (1 changes nothing), and rotation of the hue (in turns).
        order: for each image a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue.

    Source: torchvision `ColorJitter.forward`.
    """
    hue_step = jnp.argmax(order == 3, axis=1)

    def before_hue(step: Array, x: Array) -> Array:
        return _blend_step(x, factors, order[:, step], step < hue_step)

    def after_hue(step: Array, x: Array) -> Array:
        return _blend_step(x, factors, order[:, step], step > hue_step)

    # Hue costs more than the others together, so it runs once. These are loops because XLA would fuse unrolled steps
    # and compute the early ones again for every use.
    planes = jax.lax.fori_loop(0, 3, before_hue, planes)
    return jax.lax.fori_loop(1, 4, after_hue, hue(planes, factors[:, 3]))


def _blend_step(planes: Array, factors: Array, kind: Array, active: Array) -> Array:
    """Applies brightness, contrast or saturation to each image; the factor of inactive images is one: no change."""
    gray = luma(planes)
    background = jnp.where(_per_image(kind == 2, 4), gray, jnp.where(_per_image(kind == 1, 4), _mean_luma(gray), 0))
    factor = jnp.take_along_axis(factors, jnp.clip(kind, 0, 2)[:, None], axis=1)[:, 0]
    return _blend(background, planes, jnp.where(active, factor, 1))


def solarize(planes: Planes) -> Planes:
    """Inverts the values of 128 and above. Source: `ImageOps.solarize` with threshold 128."""
    return jnp.where(planes < 128, planes, 255 - planes)


def box_gaussian_blur(planes: Planes, radius: Factor, max_radius: float = 2.0) -> Planes:
    """Pillow's Gaussian blur: three box blurs along each axis, each rounded to 8 bits, with the edge repeated.

    Args:
        planes: the images.
        radius: standard deviation in pixels.
        max_radius: upper bound of `radius`; it sets the number of neighbours that are added.

    Source: `ImageFilter.GaussianBlur`; Pillow `BoxBlur.c`.
    """
    box = _box_radius(radius)
    whole = jnp.floor(box)
    inner = jnp.floor(2.0**24 / (2 * box + 1)) / 2.0**24
    outer = (1 - (2 * whole + 1) * inner) / 2
    reach = math.floor((math.sqrt(4 * max_radius**2 + 1) - 1) / 2) + 1
    taps = [jnp.where(k <= whole, inner, jnp.where(k == whole + 1, outer, 0)) for k in range(reach + 1)]
    for axis in (3, 1):
        # A loop, because XLA would otherwise fuse the passes and compute the first again for every neighbour.
        planes = jax.lax.fori_loop(0, 3, functools.partial(_box_blur, taps=taps, axis=axis), planes)
    return planes


def _box_blur(_: Array, planes: Array, taps: list[Array], axis: int) -> Array:
    """The body of a loop, hence its first argument."""
    return jnp.floor(_symmetric_filter(planes, taps, axis, "edge") + 0.5)


def _box_radius(radius: Array) -> Array:
    """Radius of the box for which three box blurs have the variance `radius`² (Gwosdek et al. 2011)."""
    variance = radius * radius / 3
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return whole + part


def kernel_gaussian_blur(planes: Planes, sigma: Factor, kernel_size: int = 9) -> Planes:
    """torchvision's Gaussian blur: a sampled kernel of odd size, with the image mirrored at its edges; rounded once.

    Source: torchvision `_functional_tensor.gaussian_blur`.
    """
    distances = range(kernel_size // 2 + 1)
    density = [jnp.exp(-0.5 * (k / sigma) ** 2) for k in distances]
    total = density[0] + 2 * sum(density[1:])
    taps = [d / total for d in density]
    for axis in (3, 1):
        planes = _symmetric_filter(planes, taps, axis, "reflect")
    return jnp.round(planes)


def _symmetric_filter(planes: Array, taps: list[Array], axis: int, edge: str) -> Array:
    """Σ taps[|k|] · planes shifted by k along an axis: additions, because grouped convolutions are far slower."""
    reach, length = len(taps) - 1, planes.shape[axis]
    padded = jnp.pad(planes, [(reach, reach) if i == axis else (0, 0) for i in range(4)], mode=edge)
    shifted = [jax.lax.slice_in_dim(padded, k, k + length, axis=axis) for k in range(2 * reach + 1)]
    pairs = [shifted[reach - k] + shifted[reach + k] for k in range(1, reach + 1)]
    return sum((_per_image(tap, 4) * pair for tap, pair in zip(taps[1:], pairs)), _per_image(taps[0], 4) * planes)


def normalize(
    planes: Planes, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Array, "batch height width 3"]:
    """Converts planes to NHWC images, (value / 255 − mean) / std. Source: torchvision `ToTensor`, `Normalize`."""
    images = planes.transpose(0, 1, 3, 2) / 255
    return (images - jnp.array([[[mean]]], jnp.float32)) / jnp.array([[[std]]], jnp.float32)


def _to_8_bit(x: Array) -> Array:
    return jnp.clip(jnp.floor(x + 0.5), 0, 255)


def _per_image(x: Array, ndim: int) -> Array:
    """Reshapes one number per image so that it broadcasts against an array of `ndim` axes."""
    return x.reshape(x.shape + (1,) * (ndim - 1))
