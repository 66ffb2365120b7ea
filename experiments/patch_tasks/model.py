"""Photos as the tasks on patches see them, and their features from a backbone."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from jaxtyping import Float32, UInt8

from dinojax.errors import UserError
from experiments.runs.settings import POSITIVE, ModelSettings

PATCHES = 32  # along the shorter side, where no size is given
Pixels = UInt8[np.ndarray, "_height _width 3"]
Features = Float32[np.ndarray, "_rows _columns dim"]
Kind = Literal["tokens", "keys"]


@dataclasses.dataclass(frozen=True)
class PatchBackbone(ModelSettings):
    """The model, and the size of the photos that it sees."""

    weights: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_WEIGHTS")] = dataclasses.field()
    image_size: Annotated[int | None, POSITIVE] = None
    """Pixels that the shorter side of each photo is resized to; the aspect is kept, and both sides are rounded to the
    nearest whole patch. None takes 32 patches: 448 px for patches of 14 px."""
    network: Literal["teacher", "student"] = "teacher"
    """Network of a run folder to use."""


@dataclasses.dataclass(frozen=True)
class Photo:
    """A photo as the model sees it.

    Attributes:
        file: of the photo.
        size: height and width of the photo in the file.
        pixels: resized to whole patches.
    """

    file: Path
    size: tuple[int, int]
    pixels: Pixels

    def to_file(self, row: float, column: float) -> tuple[float, float]:
        """X and y in the file of a place in the resized photo, given as rows and columns of pixels."""
        (height, width), (rows, columns) = self.size, self.pixels.shape[:2]
        return column * width / columns, row * height / rows


class PatchModel:
    """A backbone that is asked for patch features of photos of any size, one at a time.

    Args:
        settings: which backbone, and the size of the photos.
        seed: of random weights.
        cache_dir: folder of downloaded weights.

    Raises:
        UserError: weights that cannot be used.
    """

    def __init__(self, settings: PatchBackbone, *, seed: int, cache_dir: Path | None):
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from dinojax.images import normalize
        from dinojax.models.preprocessing import Preprocessing
        from dinojax.precision import matmul_precision
        from experiments.features.backbones import is_random, load_backbone, short_name
        from experiments.runs.settings import resolve_dtype

        backbone = load_backbone(settings.weights, network=settings.network, seed=seed, cache_dir=cache_dir)
        self.about = short_name(backbone.weights) + (" (UNTRAINED)" if is_random(settings.weights) else "")
        self.preprocessing = backbone.model.preprocessing
        self.patch_size = backbone.model.config.patch_size
        self.image_size = settings.image_size or PATCHES * self.patch_size
        dtype = jnp.dtype(resolve_dtype(settings.dtype))
        graphdef, state = nnx.split(backbone.model)
        self._state = jax.tree.map(lambda x: x.astype(dtype), state)
        self._compiled: dict = {}

        def forward(state, pixels, mean, std, kind):
            images = normalize(pixels[None], Preprocessing(mean, std)).astype(dtype)
            with jax.default_matmul_precision(matmul_precision(dtype)):
                model = nnx.merge(graphdef, state)
                found = (
                    model.get_last_keys(images)
                    if kind == "keys"
                    else model.get_intermediate_layers(images, reshape=True)[0]
                )
            return found[0].astype(jnp.float32)

        self._forward = jax.jit(forward, static_argnames=("mean", "std", "kind"))

    def photo(self, file: Path) -> Photo:
        """Reads a photo and resizes it.

        Raises:
            UserError: a file that is not a readable image.
        """
        from dinojax.images.decode import decode_rgb
        from dinojax.images.resize import Resampling, resize_to_multiple

        pixels = decode_rgb(file, str(file))
        resample = getattr(Resampling, self.preprocessing.interpolation.upper())
        resized = resize_to_multiple(pixels, self.image_size, self.patch_size, resample=resample)
        return Photo(file, pixels.shape[:2], resized)

    def features(self, photo: Photo, kind: Kind = "tokens", *, std: Sequence[float] | None = None) -> Features:
        """The features of a photo's patches.

        Args:
            photo: of whole patches.
            kind: the tokens after the final norm, or the keys of the last block's attention.
            std: standard deviations of the channels to use instead of the model's.

        Raises:
            UserError: features that are not finite, or that do not fit into memory.
        """
        import jax
        import jax.numpy as jnp

        from experiments.features.patch_maps import compile_to_fit

        size = photo.pixels.shape[:2]
        std = self.preprocessing.std if std is None else tuple(std)
        if (size, kind, std) not in self._compiled:
            pixels = jax.ShapeDtypeStruct((*size, 3), jnp.uint8)
            lowered = self._forward.lower(self._state, pixels, mean=self.preprocessing.mean, std=std, kind=kind)
            self._compiled[size, kind, std] = compile_to_fit(lowered, photo.file, size, self.patch_size)
        found = np.asarray(self._compiled[size, kind, std](self._state, photo.pixels))
        if not np.isfinite(found).all():
            raise UserError(
                f"the features of {photo.file} are not finite: the weights are damaged, or overflow in this precision "
                "(try --dtype float32)"
            )
        return found

    def note_size(self, first: Photo, what: str) -> None:
        """Prints at which size the model sees the first photo, and that its aspect has changed if it has.

        Args:
            first: photo of `photo`.
            what: how many photos there are, such as "3 photos".
        """
        (height, width), (rows, columns) = first.size, first.pixels.shape[:2]
        print(
            f"{self.about}: {what}; {first.file.name} of {width}×{height} px is seen at {columns}×{rows} px, "
            f"{columns // self.patch_size}×{rows // self.patch_size} patches of {self.patch_size} px"
        )
        wanted = self.image_size * np.array(first.size) / min(first.size)
        if any(abs(side - asked) >= 1 for side, asked in zip((rows, columns), wanted)):
            print(
                f"note: {wanted[1]:.0f}×{wanted[0]:.0f} px are not whole patches of {self.patch_size} px; both sides "
                "are rounded to the nearest, and results are given at the photo's own size"
            )
