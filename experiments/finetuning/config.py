"""The settings of supervised training on a folder of images, and the defaults of each mode."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dinojax.errors import UserError
from dinojax.finetune import MODES
from experiments.runs.settings import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    UNIMPORTANT,
    DeviceSettings,
    Flags,
    ModelSettings,
    ResumableSettings,
    check_bounds,
    flat,
    given_once,
    replace,
    require,
)

Schedule = Literal["constant", "step", "cosine"]


@dataclasses.dataclass(frozen=True)
class ModeDefaults:
    """What a mode uses where a setting is None; see the settings of the same names."""

    learning_rate: float
    schedule: Schedule = "constant"
    augment: bool = True
    warmup_epochs: float = 0.0
    weight_decay: float = 0.0
    drop_path: float = 0.0
    label_smoothing: float = 0.0
    ema_decay: float = 0.0


# The first two are as reported, except that frozen features are computed once, without augmentation.
MODE_DEFAULTS = {
    "linear": ModeDefaults(5e-4, "step", augment=False),
    "finetune": ModeDefaults(1e-4),
    "llrd": ModeDefaults(
        3e-4, "cosine", warmup_epochs=2, weight_decay=0.05, drop_path=0.1, label_smoothing=0.1, ema_decay=0.998
    ),
    "lora": ModeDefaults(1e-3, "cosine", warmup_epochs=1, weight_decay=0.01, label_smoothing=0.1),
}


@dataclasses.dataclass(frozen=True)
class FolderSettings:
    """The labelled images."""

    folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="DIR"), UNIMPORTANT] = None
    """Folder of the images; --data DIR is the same."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR"), UNIMPORTANT] = None
    """Folder of the images: training/<class>/… and validation/<class>/… (also train, val, valid), at any depth, with or
    without test/<class>/…; or class folders alone, with --val-fraction."""
    train_split: str | None = None
    """Name of the folder of training images. None takes train or training."""
    val_split: str | None = None
    """Name of the folder of validation images. None takes val, valid or validation."""
    test_split: str | None = None
    """Name of the folder of test images, which are evaluated once, at the end. None takes test or testing, if there is
    one."""
    val_fraction: float | None = None
    """Share of the training images of each class that become the validation images."""
    max_train: Annotated[int | None, POSITIVE] = None
    """Number of training images to use, drawn from every class in proportion. None uses all."""
    max_val: Annotated[int | None, POSITIVE] = None
    """Number of validation images to use, drawn from every class in proportion. None uses all."""
    balance: Literal["none", "sampling", "loss"] = "none"
    """Treatment of classes with different numbers of images: sampling draws them equally often, loss weights their
    loss."""


@dataclasses.dataclass(frozen=True)
class TunedModel(ModelSettings):
    """The pretrained model."""

    image_size: Annotated[int | None, POSITIVE] = None
    """Side in pixels of the square image that the model sees. None takes the size the model was trained at, 224 for
    published weights."""


@dataclasses.dataclass(frozen=True)
class ViewSettings:
    """How images are resized and augmented."""

    resize: Annotated[int | None, POSITIVE] = None
    """Length in pixels of the shorter side before the centre is cropped; training images are resized to squares of this
    side, from which random crops are taken. None takes 8/7 of --image-size."""
    augment: bool | None = None
    """Whether to train on random crops and flips. None does, except in the mode linear, which then computes its
    features only once."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image that a random crop covers."""
    flip: Annotated[float, PROBABILITY] = 0.5
    """Probability that a training image is mirrored."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Filter of every resizing. None takes bicubic, as DINOv2's evaluations do, or bilinear under --protocol
    reported."""


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """What is trained, and how."""

    mode: Annotated[Literal["linear", "finetune", "llrd", "lora", "all"], UNIMPORTANT] = "linear"
    """Parameters that are trained. linear: the head on a frozen backbone (SGD). finetune: everything at one learning
    rate (SGD). llrd: everything, at learning rates that fall from the head to the patches (AdamW, warm-up, drop path,
    moving average). lora: low-rank factors in the attention, and the head (AdamW). all: one after the other, into one
    table."""
    protocol: Literal["recommended", "reported"] = "recommended"
    """Set of choices that all modes share. reported repeats the article whose numbers are compared: linear sees random
    crops too, the kept epoch has the lowest validation loss, and images are resized bilinearly."""
    epochs: Annotated[int, POSITIVE] = 20
    """Number of passes through the training images."""
    batch_size: Annotated[int, POSITIVE] = 32
    """Images per step, over all devices."""
    learning_rate: Annotated[float | None, POSITIVE] = None
    """Peak learning rate of the head. None takes 5e-4 for linear, 1e-4 for finetune, 3e-4 for llrd and 1e-3 for
    lora."""
    schedule: Schedule | None = None
    """Schedule of the learning rate; step divides it by ten after half of the epochs. None takes step for linear,
    constant for finetune, and cosine for llrd and lora."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up of the learning rate. None takes 2 for llrd, 1 for lora and 0 otherwise."""
    weight_decay: Annotated[float | None, NOT_NEGATIVE] = None
    """Weight decay; AdamW spares biases, norms, tokens and positions. None takes 0.05 for llrd, 0.01 for lora and 0
    otherwise."""
    drop_path: Annotated[float | None, BELOW_ONE] = None
    """Share of residual branches that are dropped in the last block. None takes 0.1 for llrd and 0 otherwise."""
    label_smoothing: Annotated[float | None, BELOW_ONE] = None
    """Share of each label that is spread over all classes. None takes 0.1 for llrd and lora, and 0 otherwise."""
    ema_decay: Annotated[float | None, BELOW_ONE] = None
    """Decay of the moving average of the weights, which is then evaluated and kept; 0 turns it off. None takes 0.998
    for llrd and 0 otherwise."""
    momentum: Annotated[float, BELOW_ONE] = 0.9
    """Momentum of SGD."""
    layer_decay: Annotated[float, POSITIVE] = 0.75
    """Factor between the learning rates of a block and of the block above it, in the mode llrd."""
    lora_rank: Annotated[int, POSITIVE] = 8
    """Rank of the factors, in the mode lora."""
    lora_alpha: Annotated[float, POSITIVE] = 16.0
    """Scale of the factors, in the mode lora: their product is multiplied by alpha / rank."""
    clip_norm: Annotated[float, NOT_NEGATIVE] = 0.0
    """Largest norm of all gradients together. 0 turns clipping off."""
    select: Literal["accuracy", "balanced_accuracy", "loss"] | None = None
    """Measure on the validation images that chooses the epoch to keep. None takes balanced_accuracy, or loss under
    --protocol reported."""
    early_stop: Annotated[int | None, POSITIVE, UNIMPORTANT] = None
    """Number of epochs without improvement after which training stops. None trains all epochs."""


@dataclasses.dataclass(frozen=True)
class ComputeSettings(DeviceSettings):
    """Memory, speed and devices."""

    accumulation_steps: Annotated[int | None, POSITIVE] = None
    """Number of micro-batches per step. More of them need less memory and give the same step. None takes 1, or on a CPU
    as many as it takes for each to fit the caches."""
    remat: bool = False
    """Whether to recompute activations in the backward pass instead of storing them. It saves memory on a GPU and takes
    a third more time."""
    threads: Annotated[int | None, POSITIVE, UNIMPORTANT] = None
    """Number of threads that decode images. None takes one per core, at most 16."""


@dataclasses.dataclass(frozen=True)
class ResumableRun(ResumableSettings):
    """The random seed, the folders that are written to, and how an interrupted run resumes."""

    out: Annotated[Path | None, UNIMPORTANT] = None
    """Folder of the run, with a folder for each mode. The same command resumes it, and another --mode joins its table.
    None takes runs/finetune_folder/<name of DIR>-<six digits that tell its path>."""


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Supervised training on a folder of images."""

    dataset: Flags[FolderSettings] = FolderSettings()
    model: Flags[TunedModel] = TunedModel()
    training: Flags[TrainingSettings] = TrainingSettings()
    views: Flags[ViewSettings] = ViewSettings()
    compute: Flags[ComputeSettings] = ComputeSettings()
    run: Flags[ResumableRun] = ResumableRun()

    @property
    def folder(self) -> Path:
        """The run folder."""
        images = self.dataset.folder.expanduser().resolve()
        place = hashlib.sha256(os.fsencode(images)).hexdigest()[:6]
        return (self.run.out or Path("runs", "finetune_folder", f"{images.name}-{place}")).expanduser()

    @property
    def modes(self) -> tuple[str, ...]:
        """What is trained, in order."""
        return MODES if self.training.mode == "all" else (self.training.mode,)

    def resolved(self) -> "FinetuneConfig":
        """The same settings with the folder of the images in `folder`, wherever it was given.

        Raises:
            UserError: it was given twice and differs, or not at all.
        """
        given = given_once(self.dataset.folder, self.dataset.data, "data")
        if given is None:
            raise UserError("no images were given; name their folder first, or as --data DIR")
        return dataclasses.replace(self, dataset=dataclasses.replace(self.dataset, folder=given, data=None))

    def check(self) -> None:
        """Raises a `UserError` for settings that make no run."""
        check_bounds(self)
        training, warmup, epochs = self.training, self.training.warmup_epochs, self.training.epochs
        least, most = self.views.crop_scale
        require(0 < least <= most <= 1, "crop_scale", f"{least} {most}", "two shares of the image, 0 to 1, in order")
        require(warmup is None or 0 <= warmup <= epochs, "warmup_epochs", warmup, f"0 to {epochs} epochs")
        parts = self.compute.accumulation_steps or 1
        require(training.batch_size % parts == 0, "accumulation_steps", parts, f"a divisor of {training.batch_size}")
        resize, size = self.views.resize, self.model.image_size
        if resize is not None and size is not None and resize < size:
            raise UserError(f"--resize {resize} is less than the {size} px that are cut out of it")

    def of_mode(self, mode: str) -> "FinetuneConfig":
        """The same settings with the defaults of one mode and of the protocol instead of None."""
        chosen, reported = MODE_DEFAULTS[mode], self.training.protocol == "reported"
        defaults: dict[str, Any] = {
            **dataclasses.asdict(chosen),
            "augment": chosen.augment or reported,
            "warmup_epochs": min(chosen.warmup_epochs, self.training.epochs),
            "interpolation": "bilinear" if reported else "bicubic",
            "select": "loss" if reported else "balanced_accuracy",
        }
        given = flat(self)
        return replace(self, mode=mode, **{name: value for name, value in defaults.items() if given[name] is None})


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning gives.

    Attributes:
        folder: of the run.
        metrics: of every mode that is finished in it, as in metrics.json.
    """

    folder: Path
    metrics: Mapping[str, Mapping[str, Any]]
