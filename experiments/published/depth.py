"""Depth maps of photos by a published depth head."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32, UInt8
from PIL import Image

from dinojax.documents import whole_file
from dinojax.errors import UserError
from dinojax.heads import DepthEstimator
from dinojax.heads.resize import resize_bilinear
from dinojax.images import normalize
from dinojax.images.decode import decode_rgb
from dinojax.images.resize import Resampling, resize_to_multiple
from experiments.data.files import readable_name

LARGEST_SIDE = 480  # the shorter side of NYU's images, which the heads were trained on
_PER_MILLIMETRE, _PER_256TH, _LARGEST_16_BIT = 1000, 256, 65_535


class DepthMap(NamedTuple):
    """A photo as the model saw it, and the depth of every pixel of the photo itself in metres."""

    file: Path
    pixels: UInt8[np.ndarray, "height width 3"]
    depth: Float32[np.ndarray, "full_height full_width"]


def depth_maps(estimator: DepthEstimator, files: Iterable[Path], *, image_size: int | None) -> Iterator[DepthMap]:
    """Depth of each photo, one after the other; the model is compiled once for each size.

    Args:
        estimator: with its preprocessing.
        files: image files.
        image_size: pixels that the shorter side is resized to; None resizes only those above 480.

    Raises:
        UserError: a photo that cannot be read, or depths that are not finite.
    """
    graphdef, state = nnx.split(estimator)

    @jax.jit
    def forward(state: Any, pixels: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(normalize(pixels, estimator.preprocessing))

    for file in files:
        photo = decode_rgb(file, str(file))
        shorter = image_size or min(LARGEST_SIDE, *photo.shape[:2])
        pixels = photo
        if shorter != min(photo.shape[:2]):
            pixels = resize_to_multiple(photo, shorter, 1, resample=Resampling.BICUBIC)
        depth = jnp.asarray(forward(state, pixels[None]), jnp.float32)
        height, width = photo.shape[:2]
        full = np.asarray(resize_bilinear(depth[..., None], (height, width), align_corners=False))[0, ..., 0]
        if not np.isfinite(full).all():
            raise UserError(
                f"the depth of {file} is not finite: the weights are damaged, or overflow in this precision"
            )
        yield DepthMap(file, pixels, full)


def units_per_metre(max_depth: float) -> int:
    """What a 16-bit PNG counts: millimetres if they suffice, else 1/256 m, as in KITTI's files."""
    return _PER_MILLIMETRE if max_depth * _PER_MILLIMETRE <= _LARGEST_16_BIT else _PER_256TH


def write_depth(folder: Path, name: str, depth: Float32[np.ndarray, "height width"], units: int) -> None:
    """Writes NAME_depth.npy in metres, and NAME_depth.png with 16 bits in `units` per metre."""
    with whole_file(folder / f"{name}_depth.npy") as file:
        np.save(file, depth)
    counts = np.clip(np.rint(depth * units), 0, _LARGEST_16_BIT).astype(np.uint16)
    with whole_file(folder / f"{name}_depth.png") as file:
        Image.fromarray(counts).save(file, "PNG")


def own_names(files: Iterable[Path]) -> list[str]:
    """A name for the output files of each image, told apart by numbers."""
    taken: set[str] = set()
    names = []
    for file in files:
        stem = readable_name(file.stem)
        candidates = (stem if count == 1 else f"{stem}_{count}" for count in itertools.count(1))
        names.append(next(name for name in candidates if name.casefold() not in taken))
        taken.add(names[-1].casefold())
    return names
