"""The settings of training a dense head, and what a training gives."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from dinojax.errors import UserError
from experiments.dense_tasks.pairs import Task
from experiments.runs.settings import (
    BELOW_ONE,
    INNER_FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    BackboneSettings,
    Flags,
    RunSettings,
    check_bounds,
    require,
)

PATCHES = 32  # along the side of a window, where no size is given


@dataclasses.dataclass(frozen=True)
class PairSettings:
    """The photos, and their masks or depth maps."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of images/ beside masks/ (or depth/), with files of the same names; or of train/, val/ and perhaps test/
    that hold these two; or of images/train/, masks/train/ and so on."""
    task: Task = "segmentation"
    """What is predicted for each pixel: a class, or the distance in metres."""
    classes: Path | None = None
    """Table of the classes: CSV lines name or name,r,g,b, or JSON. None takes the indices of the masks as they are."""
    void: int = 255
    """Index of mask pixels that do not count."""
    target_suffix: str = ""
    """End of the names of masks that the names of photos lack, such as _mask."""
    depth_scale: Annotated[float, POSITIVE] = 1000.0
    """Numbers of a 16-bit depth image per metre, 1000 for millimetres and 256 for KITTI. Files called .npy hold
    metres."""
    min_depth: Annotated[float, POSITIVE] = 0.001
    """Smallest depth in metres that is predicted."""
    max_depth: Annotated[float | None, POSITIVE] = None
    """Largest depth in metres that is predicted; deeper pixels do not count. None takes the largest of the training
    images."""
    val_fraction: Annotated[float | None, INNER_FRACTION] = None
    """Share of the training images that become the validation images, 0.2 where there are no others."""
    max_train: Annotated[int | None, POSITIVE] = None
    """Number of training images to use. None uses all."""
    max_val: Annotated[int | None, POSITIVE] = None
    """Number of validation images to use. None uses all."""


@dataclasses.dataclass(frozen=True)
class DenseBackbone(BackboneSettings):
    """The frozen backbone, and the size of what it sees."""

    image_size: Annotated[int | None, POSITIVE] = None
    """Pixels that the shorter side of each photo is resized to. None takes 32 patches, 448 px for patches of 14 px."""
    window: Annotated[int | None, POSITIVE] = None
    """Side in pixels of the square windows that the model sees; a larger photo is cut into several. None takes
    --image-size, at most 32 patches."""
    overlap: Annotated[float, BELOW_ONE] = 0.25
    """Least share of a window that the next one covers too."""
    blocks: Annotated[int, POSITIVE] = 1
    """Number of last blocks whose patch features are joined, 1 or 4 in the DINOv2 paper."""


@dataclasses.dataclass(frozen=True)
class HeadSettings:
    """The head, which is one linear layer after batch normalisation, and its training."""

    epochs: Annotated[int, POSITIVE] = 50
    """Number of passes through the training windows."""
    batch_windows: Annotated[int, POSITIVE] = 16
    """Windows per training step."""
    learning_rate: Annotated[float, POSITIVE] = 1e-3
    """Peak learning rate of AdamW, which falls along a line to 0."""
    warmup: Annotated[float, BELOW_ONE] = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 1e-4
    """Weight decay of AdamW."""
    bins: Annotated[int, POSITIVE] = 256
    """Number of depths that a depth head weights, evenly spaced."""
    mirror: bool = False
    """Whether to train on the mirror image of each window too, which takes twice the features."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes of the photos at the final evaluation, as multiples of --image-size; their predictions are averaged."""


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """Training of a dense head."""

    data: Flags[PairSettings]
    model: Flags[DenseBackbone] = DenseBackbone()
    head: Flags[HeadSettings] = HeadSettings()
    run: Flags[RunSettings] = RunSettings()

    def check(self) -> None:
        """Raises a `UserError` for settings that make no run."""
        check_bounds(self)
        check_scales(self.head.scales)
        least, most, size, window = self.data.min_depth, self.data.max_depth, self.model.image_size, self.model.window
        require(most is None or most > least, "max_depth", most, f"above --min-depth {least:g}")
        if size is not None and window is not None and window > size:
            raise UserError(f"--window {window} is larger than --image-size {size}; a photo must fill a window")


def check_scales(scales: tuple[float, ...]) -> None:
    """Raises a `UserError` unless there is a scale, and all are usable."""
    require(bool(scales) and all(0 < scale <= 16 for scale in scales), "scales", scales, "numbers above 0 and up to 16")


@dataclasses.dataclass(frozen=True)
class DenseResult:
    """What a training gives.

    Attributes:
        folder: of the run.
        metrics: by split, as in result.json.
    """

    folder: Path
    metrics: Mapping[str, Mapping[str, Any]]
