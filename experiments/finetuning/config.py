"""The settings of supervised training on a folder of images: what each mode does unless it is told otherwise."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dinojax.errors import UserError
from dinojax.finetune import MODES
from experiments.runs.settings import require, require_positive

# Settings that do not change what is learnt: a run goes on under other values of these.
FREE = {"folder", "mode", "out", "cache_dir", "threads", "early_stop"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a mode does; every field is a flag of the command.

    Attributes:
        learning_rate: the head's, at its peak.
        schedule: "step" divides the rate by ten after half of the epochs, "cosine" lets it fall to zero.
        augment: random crops and flips; without them a frozen backbone's features are computed once.
        warmup_epochs: in which the rate rises linearly from zero.
        weight_decay: SGD's on everything, AdamW's on what is not a bias, a norm, a token or a position.
        drop_path: highest rate of drop path.
        label_smoothing: share of each label that is spread over all classes.
        ema_decay: weight of the old moving average of the weights, which is then what is judged; 0 is without.
    """

    learning_rate: float
    schedule: Literal["constant", "step", "cosine"] = "constant"
    augment: bool = True
    warmup_epochs: float = 0.0
    weight_decay: float = 0.0
    drop_path: float = 0.0
    label_smoothing: float = 0.0
    ema_decay: float = 0.0


# The first two are those of the article that this repeats, but that plain frozen features are computed once.
RECIPES = {
    "linear": Recipe(5e-4, "step", augment=False),
    "finetune": Recipe(1e-4),
    "llrd": Recipe(
        3e-4, "cosine", warmup_epochs=2, weight_decay=0.05, drop_path=0.1, label_smoothing=0.1, ema_decay=0.998
    ),
    "lora": Recipe(1e-3, "cosine", warmup_epochs=1, weight_decay=0.01, label_smoothing=0.1),
}


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """A classifier from a folder of images; see the top of the command's file. Unset rates are the mode's own."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Images in training/<class>/… and validation/<class>/… (also train, val, valid; nested at will), a test split if
    there is one; or class folders alone, with --val-fraction."""
    mode: Literal["linear", "finetune", "llrd", "lora", "all"] = "linear"
    """linear: the head on a frozen backbone (SGD). finetune: everything at one rate (SGD). llrd: everything, the rate
    falling from the head to the patches (AdamW, warm-up, drop path, moving average). lora: low-rank factors in the
    attention and the head (AdamW). all: one after the other, into one table."""
    protocol: Literal["recommended", "seed"] = "recommended"
    """seed: as the article that this repeats: linear sees random crops as well, the best epoch is that of the lowest
    validation loss, and images are resized bilinearly."""
    weights: str = "dinov2_vits14"
    """A published checkpoint by its torch.hub name (dino_vits16 … dinov2_vitg14_reg), dinojax_vitt (inside the package:
    no download), a .pth or .safetensors file, a folder made by `python -m converters`, the run folder of a training,
    or "random:NAME" (never trained)."""

    train_split: str | None = None
    """Name of the folder of training images, if it is none of the usual."""
    val_split: str | None = None
    """Likewise, of validation images."""
    test_split: str | None = None
    """Likewise, of test images, which are judged once, at the end."""
    val_fraction: float | None = None
    """Share of the training images of each class that becomes the validation split."""
    max_train: int | None = None
    """Use only this many training images, drawn from every class in proportion."""
    max_val: int | None = None
    """Likewise for validation images."""
    balance: Literal["none", "sampling", "loss"] = "none"
    """Where classes have unlike numbers of images: draw them equally often, or weight their loss."""

    image_size: int | None = None
    """Pixels of the square a model sees. Default: 224, or the size that small weights were trained at."""
    resize: int | None = None
    """Pixels of the shorter side before the centre is cut out; training images are squeezed to squares of this side, of
    which random crops are taken. Default: 8/7 of --image-size, 256 for 224."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest share of the image that a random crop covers."""
    flip: float = 0.5
    """How often a training image is mirrored."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Of every resizing. Default: bicubic, as DINOv2 evaluates; bilinear under --protocol seed."""

    epochs: int = 20
    """Passes through the training images."""
    batch_size: int = 32
    """Images a step, over all devices."""
    learning_rate: float | None = None
    """Of the head, at its peak. Default: linear 5e-4, finetune 1e-4, llrd 3e-4, lora 1e-3."""
    schedule: Literal["constant", "step", "cosine"] | None = None
    """step: a tenth after half of the epochs. Default: linear step, finetune constant, llrd and lora cosine."""
    augment: bool | None = None
    """Random crops and flips. Default: not for linear, whose features are then computed once."""
    warmup_epochs: float | None = None
    """In which the rate rises from 0. Default: llrd 2, lora 1."""
    weight_decay: float | None = None
    """Default: llrd 0.05, lora 0.01, SGD 0."""
    drop_path: float | None = None
    """Share of residual branches that are dropped in the last block. Default: llrd 0.1."""
    label_smoothing: float | None = None
    """Default: llrd and lora 0.1."""
    ema_decay: float | None = None
    """Weight of the old moving average of the weights, which is then judged and kept; 0 is without. Default: llrd
    0.998."""
    momentum: float = 0.9
    """Of SGD; the article does not give its own."""
    layer_decay: float = 0.75
    """llrd: each block learns at this share of the rate of the one above it."""
    lora_rank: int = 8
    """lora: columns of each factor."""
    lora_alpha: float = 16.0
    """lora: the change of a matrix is alpha / rank times the product of its factors."""
    clip_norm: float = 0.0
    """Largest norm of all gradients together; 0 does not clip."""

    select: Literal["accuracy", "balanced_accuracy", "loss"] | None = None
    """What of the validation images chooses the epoch that is kept. Default: balanced_accuracy; loss under --protocol
    seed."""
    early_stop: int | None = None
    """Stop after so many epochs without a better one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; auto is float32 on a CPU and bfloat16 elsewhere. Weights stay float32."""
    accumulation_steps: int | None = None
    """Parts of the batch that follow each other: less memory, the same step. Default: 1; on a CPU, parts of as many
    images as its caches hold."""
    remat: bool = False
    """Compute activations again for the gradient in place of keeping them: less memory on a GPU, a third more time."""
    threads: int | None = None
    """That decode images. Default: one for each core, at most 16."""
    seed: int = 0
    """Of the head, the factors, the order of the images and their views."""
    out: Path | None = None
    """The run folder; each mode has a folder in it. Default: runs/finetune_folder/<name of DIR>. The same command goes
    on with what is in it, and another --mode joins its table."""
    cache_dir: Path = Path("~/.cache/dinojax")
    """Where features and downloaded weights are kept."""

    def check(self) -> None:
        """Raises a `UserError` for settings that nothing can be trained with."""
        positive = (
            *("max_train", "max_val", "image_size", "resize", "epochs", "batch_size", "learning_rate", "lora_rank"),
            *("lora_alpha", "early_stop", "threads", "layer_decay", "accumulation_steps"),
        )
        require_positive(self, positive)
        for name in ("drop_path", "label_smoothing", "ema_decay", "momentum"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, name, value, "0 or more and below 1")
        for name in ("weight_decay", "clip_norm"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, value, "0 or more")
        require(0 <= self.flip <= 1, "flip", self.flip, "between 0 and 1")
        least, most = self.crop_scale
        require(0 < least <= most <= 1, "crop_scale", f"{least} {most}", "two shares of the image, 0 to 1, in order")
        warmup = self.warmup_epochs
        require(warmup is None or 0 <= warmup <= self.epochs, "warmup_epochs", warmup, f"0 to {self.epochs} epochs")
        parts = self.accumulation_steps or 1
        require(self.batch_size % parts == 0, "accumulation_steps", parts, f"a divisor of {self.batch_size}")
        if self.resize is not None and self.image_size is not None and self.resize < self.image_size:
            raise UserError(f"--resize {self.resize} is less than the {self.image_size} px that are cut out of it")

    @property
    def modes(self) -> tuple[str, ...]:
        """What is trained, in order."""
        return MODES if self.mode == "all" else (self.mode,)

    def of_mode(self, mode: str) -> "FinetuneConfig":
        """The same with every default of one mode written out."""
        recipe, seed = dataclasses.asdict(RECIPES[mode]), self.protocol == "seed"
        defaults: dict[str, Any] = {
            **recipe,
            "augment": recipe["augment"] or seed,
            "interpolation": "bilinear" if seed else "bicubic",
            "select": "loss" if seed else "balanced_accuracy",
        }
        defaults["warmup_epochs"] = min(defaults["warmup_epochs"], self.epochs)
        unset = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, mode=mode, **unset)
