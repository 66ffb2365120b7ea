"""Images resized with torchvision's arithmetic on Pillow."""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from dinojax.errors import UserError

Square = UInt8[np.ndarray, "_side _side 3"]
Resampling = Image.Resampling
Pixels = UInt8[np.ndarray, "_height _width 3"] | Float32[np.ndarray, "_height _width 3"]
_LONGEST = 20  # times its shorter side
_MOST_PIXELS = 2**27


def resize_square(image: Pixels, side: int, *, resample: Resampling = Resampling.BILINEAR) -> Pixels:
    """The whole image resized to `side` × `side` px; its aspect is not kept.

    Source: torchvision `Resize((side, side))` of a Pillow image: bilinear by default, and antialiased.
    """
    return _resize(image, (side, side), resample)


def resize_centre_crop(image: Pixels, resize: int, crop: int, *, resample: Resampling = Resampling.BILINEAR) -> Pixels:
    """The central square of `crop` px after the shorter side was resized to `resize` px.

    Of an image that is more than `_LONGEST` times as long as wide, only the part around the square is resized: one of
    1 × 20,000 px would become 256 × 5,120,000 px. Its values differ by rounding, and where Pillow clips them.

    Raises:
        ValueError: the crop is larger than the shorter side, where torchvision would add black borders.

    Source: torchvision `Resize(resize)` (`_compute_resized_output_size`: the longer side is truncated) and
    `CenterCrop(crop)` (`functional.center_crop`: offsets are rounded half to even).
    """
    if crop > resize:
        raise ValueError(f"a centre crop of {crop} px does not fit a shorter side of {resize} px")
    height, width = image.shape[:2]
    shorter = min(height, width)
    resized = int(resize * height / shorter), int(resize * width / shorter)
    top, left = (round((side - crop) / 2) for side in resized)
    if max(height, width) <= _LONGEST * shorter:
        return _resize(image, resized, resample)[top : top + crop, left : left + crop]
    rows, columns = ((start * side / size, (start + crop) * side / size)
                     for start, side, size in zip((top, left), (height, width), resized))  # fmt: skip
    return _resize(image, (crop, crop), resample, box=(columns[0], rows[0], columns[1], rows[1]))


def resize_to_multiple(image: Pixels, shorter: int, multiple: int, *, resample: Resampling) -> Pixels:
    """The whole image with its shorter side near `shorter` px, and both sides rounded to a multiple of `multiple`.

    Raises:
        UserError: the result would have more than 134 million pixels.
    """
    size = tuple(max(1, round(shorter * side / min(image.shape[:2]) / multiple)) * multiple for side in image.shape[:2])
    if size[0] * size[1] > _MOST_PIXELS:
        raise UserError(
            f"an image of {image.shape[1]}×{image.shape[0]} px would become {size[1]}×{size[0]} px; crop it, or take a "
            "smaller size"
        )
    return _resize(image, size, resample)


def _resize(
    image: Pixels,
    size: tuple[int, ...],
    resample: Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> Pixels:
    """The image, or a `box` of it, at `size` (height, width). Floats are not rounded, nor clipped to 0–1."""
    width_first = (size[1], size[0])
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).resize(width_first, resample, box=box))
    channels = (Image.fromarray(image[..., channel]) for channel in range(image.shape[-1]))
    return np.stack([np.asarray(channel.resize(width_first, resample, box=box)) for channel in channels], axis=-1)
