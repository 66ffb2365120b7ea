"""Attention and patch features of pictures of any size and shape."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from dinojax import maps
from dinojax.errors import UserError
from dinojax.models.preprocessing import Preprocessing
from dinojax.precision import matmul_precision
from experiments.features.backbones import Normalisation
from experiments.runs.settings import Dtype, resolve_dtype

if TYPE_CHECKING:
    from dinojax.models.vit import VisionTransformer

_MOST_MEMORY = 0.8  # share of the memory


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image file, resized to `resized` (height, width) and cropped to `size`.

    The names of its output files start with `name`.
    """

    name: str
    file: Path
    resized: tuple[int, int]
    size: tuple[int, int]

    def read(self) -> UInt8[np.ndarray, "height width 3"]:
        """The resized and cropped pixels."""
        from PIL import Image

        from dinojax.images.decode import decode_rgb

        pixels = decode_rgb(self.file, str(self.file))
        if pixels.shape[:2] != self.resized:
            pixels = np.asarray(Image.fromarray(pixels).resize(self.resized[::-1], Image.Resampling.BICUBIC))
        return pixels[: self.size[0], : self.size[1]]


class PatchMaps(NamedTuple):
    """The patches of an image in the last block.

    Attributes:
        attention: attention of the class token to each patch: the mean of the heads, then each head.
        features: patch tokens after the final norm.
    """

    attention: Float[np.ndarray, "maps rows columns"]
    features: Float[np.ndarray, "rows columns dim"]


class Mapper:
    """Computes patch maps of pictures of any size; the model is compiled once for each size.

    Args:
        model: of any patch size.
        normalisation: mean and standard deviation of the pixels (0–1) that the model expects.
        dtype: number type of the model's computation; "auto" is float32 on a CPU and bfloat16 on accelerators.
    """

    def __init__(self, model: "VisionTransformer", normalisation: Normalisation, dtype: Dtype):
        from dinojax.images import normalize  # here, because it loads Pillow

        self.dtype = jnp.dtype(resolve_dtype(dtype))
        self.config = model.config
        graphdef, state = nnx.split(model)
        self._state = jax.tree.map(lambda x: x.astype(self.dtype), state)
        self._compiled = {}
        preprocessing = Preprocessing(*normalisation)

        def forward(state, pixels):
            images = normalize(pixels[None], preprocessing).astype(self.dtype)
            grid = [side // self.config.patch_size for side in pixels.shape[:2]]
            with jax.default_matmul_precision(matmul_precision(self.dtype)):
                model = nnx.merge(graphdef, state)
                # XLA computes the blocks that both have in common once.
                attention, features = model.get_last_selfattention(images), model(images).patch_tokens
            registers = self.config.num_register_tokens
            attention = maps.cls_attention(attention, *grid, num_register_tokens=registers)[0].astype(jnp.float32)
            attention = jnp.concatenate([attention.mean(axis=0, keepdims=True), attention])
            return attention, features.reshape(*grid, -1).astype(jnp.float32)

        self._forward = jax.jit(forward)

    def __call__(self, picture: Picture) -> PatchMaps:
        """The maps of a picture.

        Raises:
            UserError: the maps are not finite, or `prepare` refuses the picture.
        """
        found = PatchMaps(*map(np.asarray, self.prepare(picture)(self._state, picture.read())))
        if not all(np.isfinite(array).all() for array in found):
            raise UserError(
                f"the features of {picture.file} are not finite: the weights are damaged, or overflow in this "
                "precision (try --dtype float32)"
            )
        return found

    def prepare(self, picture: Picture) -> jax.stages.Compiled:
        """The model compiled for the picture's size.

        Raises:
            UserError: the attention would not fit into memory.
        """
        if picture.size not in self._compiled:
            lowered = self._forward.lower(self._state, jax.ShapeDtypeStruct((*picture.size, 3), jnp.uint8))
            compiled = compile_to_fit(lowered, picture.file, picture.size, self.config.patch_size)
            self._compiled[picture.size] = compiled
        return self._compiled[picture.size]


def compile_to_fit(lowered: jax.stages.Lowered, file: Path, size: tuple[int, int], patch: int) -> jax.stages.Compiled:
    """A model's program for one picture, compiled.

    Args:
        lowered: the program.
        file: of the picture, for the message.
        size: height and width of the picture as the model sees it.
        patch: side of the model's patches in pixels.

    Raises:
        UserError: the attention would not fit into memory.
    """
    compiled = lowered.compile()
    device = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    there = device or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = compiled.memory_analysis().temp_size_in_bytes
    if needed > _MOST_MEMORY * there:
        height, width = size
        # The attention of n patches is n × n numbers, and n grows with the square of the side.
        fitting = int(min(height, width) * (0.5 * there / needed) ** 0.25) // patch * patch
        raise UserError(
            f"{file} at {width}×{height} px has {height * width // patch**2:,} patches, whose attention takes "
            f"{needed / 1e9:.0f} GB of the {there / 1e9:.0f} GB of memory; pass --image-size {fitting} or less"
        )
    return compiled
