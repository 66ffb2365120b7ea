"""Images of any shape made squares of one size, with torchvision's arithmetic on Pillow; and splits of such squares."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from experiments.data.decode import Pixels, decode_rgb, one_large_image
from experiments.data.splits import Split

Square = UInt8[np.ndarray, "_side _side 3"]
Resampling = Image.Resampling
_LONGEST = 20  # times its shorter side


def resize_square(image: Pixels, side: int, *, resample: Resampling = Resampling.BILINEAR) -> Square:
    """The whole image resized to `side` × `side` px; its aspect is not kept.

    Source: torchvision `Resize((side, side))` of a Pillow image: bilinear by default, and antialiased.
    """
    return np.asarray(Image.fromarray(image).resize((side, side), resample))


def resize_centre_crop(image: Pixels, resize: int, crop: int, *, resample: Resampling = Resampling.BILINEAR) -> Square:
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
        pixels = np.asarray(Image.fromarray(image).resize(resized[::-1], resample))
        return pixels[top : top + crop, left : left + crop]
    rows, columns = ((start * side / size, (start + crop) * side / size)
                     for start, side, size in zip((top, left), (height, width), resized))  # fmt: skip
    box = (columns[0], rows[0], columns[1], rows[1])
    return np.asarray(Image.fromarray(image).resize((crop, crop), resample, box=box))


def load_square(split: Split, index: int, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Image `index` of a split as models see it: the shorter side resized to `size` px (bicubic), centre crop."""
    with one_large_image():
        return resize_centre_crop(split.read(index), size, size, resample=Resampling.BICUBIC)


def centre_cropped(split: Split, resize: int, size: int, *, interpolation: str = "bicubic") -> Split:
    """The same images through `resize_centre_crop`, as a split of its own, whose features are cached on their own."""
    resample = Resampling[interpolation.upper()]

    def read(index: int) -> Pixels:
        with one_large_image():
            return resize_centre_crop(split.read(index), resize, size, resample=resample)

    return split.changed(read, f"shorter side {resize} px {interpolation}, centre {size} px")


def reduced(split: Split, side: int) -> Split:
    """The same files, with large JPEGs decoded at a half, a quarter or an eighth of their size: at least 2 · `side` px.

    This takes a seventh of the time at 12 megapixels. It is for views of about `side` px that need not be exact: the
    JPEG decoder averages blocks of pixels before Pillow resizes, which changes one value in three by 1 and few by more
    than 2; and it rounds sides up, which may shift a crop by a pixel. Comparisons with torchvision need whole images.

    Source: Pillow `JpegImageFile.draft`.
    """

    def read(index: int) -> Pixels:
        return decode_rgb(split.files[index], str(split.files[index]), draft=2 * side)

    return split.changed(read, f"reduced JPEG, {side} px")
