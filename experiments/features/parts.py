"""The features of images, by name: what a backbone computes from them, or their raw pixels."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

CLS, MEAN_PATCH, PIXELS = "cls", "mean_patch", "pixels"

Rows = Int[np.ndarray, " rows"] | slice


@dataclasses.dataclass(frozen=True)
class FeatureParts:
    """Features of images. A backbone gives `cls` and `mean_patch`; raw pixels are `pixels` alone.

    Attributes:
        cls: the normalised CLS tokens after each of the last blocks, the last block's at the end.
        mean_patch: the mean of the last block's normalised patch tokens.
        pixels: raw pixels between 0 and 1.
    """

    cls: Float[np.ndarray, "images blocks dim"] | None = None
    mean_patch: Float[np.ndarray, "images dim"] | None = None
    pixels: Float[np.ndarray, "images values"] | None = None

    @classmethod
    def of_tokens(cls, tokens: Float[np.ndarray, "images tokens dim"]) -> "FeatureParts":
        """From CLS tokens followed by the mean patch, as they are cached."""
        return cls(cls=tokens[:, :-1], mean_patch=tokens[:, -1])

    @property
    def tokens(self) -> Float[np.ndarray, "images tokens dim"]:
        """CLS tokens followed by the mean patch, as `fit_linear_sweep` takes them."""
        return np.concatenate([self.cls, self.mean_patch[:, None]], axis=1)

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """The parts that there are, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

    def vectors(
        self, part: str = CLS, *, blocks: int = 1, mean_patch: bool = False
    ) -> Float[np.ndarray, "images width"]:
        """One vector per image.

        Args:
            part: name of the part.
            blocks: of `cls`, how many of the last tokens are concatenated, in their order.
            mean_patch: whether `mean_patch` is appended to them.
        """
        if part != CLS:
            return np.ascontiguousarray(self.arrays[part])
        chosen = self.cls[:, -blocks:].reshape(len(self), -1)
        return np.concatenate([chosen, self.mean_patch], axis=1) if mean_patch else np.ascontiguousarray(chosen)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, rows: Rows) -> "FeatureParts":
        return FeatureParts(**{name: array[rows] for name, array in self.arrays.items()})


def concatenate(features: Sequence[FeatureParts]) -> FeatureParts:
    """The images of all, one after the other."""
    names = features[0].arrays
    return FeatureParts(**{name: np.concatenate([one.arrays[name] for one in features]) for name in names})
