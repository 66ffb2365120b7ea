"""What a model expects of its images; `dinojax.preprocess` makes it so."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dinojax.errors import require

# Source: facebookresearch/dino 7c446df `eval_knn.py`, facebookresearch/dinov2 b8931f7 `dinov2/data/transforms.py`.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")
LARGEST_SIDE = 2**16


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its images. The defaults are those of the published DINOv2 models.

    Attributes:
        mean: of each channel of the pixels (0–1), which is subtracted.
        std: standard deviation of each channel, which divides.
        image_size: side in pixels of the square images that the model is used with.
        patch_size: side of a patch in pixels.
        interpolation: how images are resized: "bicubic", "bilinear", "lanczos" or "nearest"; antialiased.

    Raises:
        UserError: a value of another type, or one that no model has.
    """

    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    image_size: int = 224
    patch_size: int = 14
    interpolation: str = "bicubic"

    def __post_init__(self):
        for name in ("mean", "std"):
            values = getattr(self, name)
            given = isinstance(values, Sequence) and all(_is_number(value) for value in values) and len(values) > 0
            require(given, name, values, "a number for each channel")
            object.__setattr__(self, name, tuple(map(float, values)))
        require(min(self.std) > 0, "std", self.std, "positive")
        require(len(self.mean) == len(self.std), "std", self.std, f"as long as mean={self.mean}")
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_SIDE
            require(whole, name, value, f"a whole number from 1 to {LARGEST_SIDE}")
        require(
            self.interpolation in _INTERPOLATIONS, "interpolation", self.interpolation, " or ".join(_INTERPOLATIONS)
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
