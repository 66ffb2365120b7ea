"""Splits of square images: any shape, resized to one size."""

import numpy as np
from jaxtyping import UInt8

from dinojax.images.decode import Pixels, decode_rgb, one_large_image
from dinojax.images.resize import Resampling, resize_centre_crop
from experiments.data.splits import Split


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
