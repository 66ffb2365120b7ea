"""The photos that a task is given, and masks beside them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import Bool

from dinojax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PhotoFiles:
    """The photos."""

    photos: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PHOTOS…", help_behavior_hint="(one or more)")
    ]
    """Photos (JPEG, PNG, WebP and others), or folders of them."""


def photo_files(photos: Sequence[Path]) -> list[Path]:
    """The files, of folders at any depth; files that cannot be read are named and left out.

    Raises:
        UserError: no photos, or one that cannot be read.
    """
    from experiments.data.files import readable_images

    if not photos:
        raise UserError("no photos were given; name image files or folders after the weights")
    return list(readable_images(photos))


def mask_beside(folder: Path, photo: Path) -> Path | None:
    """The mask of a photo in a folder: the file with its stem, or None."""
    found = sorted(path for path in folder.glob("*") if path.stem == photo.stem and path.is_file())
    if len(found) > 1:
        raise UserError(f"{folder} holds {found[0].name} and {found[1].name}, two masks of {photo.name}; remove one")
    return found[0] if found else None


def read_mask(file: Path, size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """Where a mask image is not 0.

    Raises:
        UserError: a file that is no mask, or not of `size` (height, width).
    """
    from dinojax.images.decode import decode_rgb, decode_values, has_colours

    coloured = has_colours(file, str(file))
    mask = decode_rgb(file, str(file)).any(axis=-1) if coloured else decode_values(file, str(file)) > 0
    if mask.shape != size:
        raise UserError(
            f"{file} is {mask.shape[1]}×{mask.shape[0]} px, and its photo {size[1]}×{size[0]}; give a mask of that size"
        )
    return mask


def resized_mask(mask: Bool[np.ndarray, "height width"], size: tuple[int, int]) -> Bool[np.ndarray, "rows columns"]:
    """A mask at another size, by the nearest pixel."""
    from PIL import Image

    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
