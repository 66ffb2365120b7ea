"""Images of any shape made squares of one size, with torchvision's arithmetic on Pillow; and splits of such squares."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from experiments.data.splits import Pixels, Split, digest

Square = UInt8[np.ndarray, "_side _side 3"]
Resampling = Image.Resampling


def squash(image: Pixels, side: int, *, resample: Resampling = Resampling.BILINEAR) -> Square:
    """Resized to side × side px, whatever its shape was.

    Source: torchvision `Resize((side, side))` of a Pillow image: bilinear unless told otherwise, and antialiased.
    """
    return np.asarray(Image.fromarray(image).resize((side, side), resample))


def shorter_side_centre_crop(
    image: Pixels, resize: int, crop: int, *, resample: Resampling = Resampling.BILINEAR
) -> Square:
    """Resized so that the shorter side has `resize` px, and the square of `crop` px around the centre of that.

    Raises:
        ValueError: the square is larger than the shorter side, where torchvision would add black borders.

    Source: torchvision `Resize(resize)` (`_compute_resized_output_size`: the longer side is truncated) and
    `CenterCrop(crop)` (`functional.center_crop`: offsets are rounded half to even).
    """
    if crop > resize:
        raise ValueError(f"a centre crop of {crop} px does not fit a shorter side of {resize} px")
    height, width = image.shape[:2]
    shorter = min(height, width)
    resized = int(resize * height / shorter), int(resize * width / shorter)
    top, left = (round((side - crop) / 2) for side in resized)
    pixels = np.asarray(Image.fromarray(image).resize(resized[::-1], resample))
    return pixels[top : top + crop, left : left + crop]


def centre_cropped(split: Split, resize: int, size: int, *, interpolation: str) -> Split:
    """The same images resized to a shorter side of `resize` px, the square of `size` px around the centre cut out."""
    resample = Resampling[interpolation.upper()]
    recipe = digest(split.fingerprint, f"shorter side {resize} px {interpolation}, centre {size} px, as torchvision")

    def read(index: int) -> Pixels:
        return shorter_side_centre_crop(split.read(index), resize, size, resample=resample)

    return dataclasses.replace(split, read=read, fingerprint=recipe)


def reduced(split: Split, root: Path, side: int) -> Split:
    """The same files, large JPEGs decoded at a half, a quarter or an eighth of their size, never below 2 · `side` px.

    For images of about `side` px that need not be exact: it takes a seventh of the time at 12 megapixels. The JPEG
    decoder then averages blocks of pixels before Pillow resizes: a value in three changes by a level, few by more than
    two; and sides are rounded up, which may shift a crop by a pixel. Comparisons with torchvision need the whole image.

    Args:
        split: of files, its ids paths inside `root`.
        root: folder.
        side: pixels.

    Source: Pillow `JpegImageFile.draft`.
    """
    folder = root.expanduser()

    def read(index: int) -> Pixels:
        # What cannot be read this way is read whole below, or it is said there what is wrong with it.
        unreadable = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
        with contextlib.suppress(*unreadable), Image.open(folder / split.ids[index]) as image:
            if image.format == "JPEG":
                image.draft(None, (2 * side, 2 * side))
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        return split.read(index)

    return dataclasses.replace(split, read=read, fingerprint=digest(split.fingerprint, f"reduced JPEG, {side} px"))
