"""Small copies of images, for pages and contact sheets."""

import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dinojax.errors import UserError
from dinojax.images.decode import decode_rgb, one_large_image

SIDE = 160  # pixels of the longer side
_QUALITY = 82  # of JPEG

Thumbnail = UInt8[np.ndarray, "_height _width 3"]


def thumbnails(files: Mapping[int, Path]) -> dict[int, Thumbnail]:
    """Whole images whose longer side is at most `SIDE` px, by the keys of `files`.

    Files that are not readable images are left out; how many, and the first of them, is printed.
    """

    def read(file: Path) -> Thumbnail | UserError:
        try:
            with one_large_image():
                return shrunk(decode_rgb(file, str(file), draft=2 * SIDE))
        except UserError as error:
            return error

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), "thumbnails") as pool:
        found = dict(zip(files, pool.map(read, files.values())))
    errors = [one for one in found.values() if isinstance(one, UserError)]
    if errors:
        print(f"note: {len(errors):,} of {len(found):,} thumbnails are missing; the first: {errors[0]}")
    return {key: one for key, one in found.items() if not isinstance(one, UserError)}


def shrunk(pixels: UInt8[np.ndarray, "height width 3"]) -> Thumbnail:
    """The whole image with its longer side at most `SIDE` px, bicubic and antialiased."""
    longer = max(pixels.shape[:2])
    if longer <= SIDE:
        return pixels
    height, width = (max(1, round(SIDE * side / longer)) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(thumbnail: Thumbnail) -> bytes:
    """The thumbnail as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(thumbnail).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def first_of_each(groups: Sequence[Sequence[int]], per_group: int, total: int) -> list[list[int]]:
    """The first `per_group` images of each group, for as many groups as hold `total` images together."""
    shown: list[list[int]] = []
    for group in groups:
        if sum(map(len, shown)) + len(group[:per_group]) > total and shown:
            break
        shown.append(list(group[:per_group]))
    return shown
