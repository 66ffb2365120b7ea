"""The settings of a DINO pretraining run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import tyro

from dinojax.models.config import ViTConfig
from dinojax.pretraining.augment import MultiCropConfig
from experiments.pretraining.objective import MethodSettings, StartSettings
from experiments.runs.settings import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    UNIMPORTANT,
    DataSettings,
    DeviceSettings,
    Dtype,
    Flags,
    ResumableSettings,
    check_bounds,
    require,
)


@dataclasses.dataclass(frozen=True)
class ImageSettings(DataSettings):
    """The training images, and how they are stored; only the k-NN and the evaluation use labels."""

    data: str
    """Name or folder of the images: any folder of images, at any depth and without labels; digits (in scikit-learn, no
    download); tiny_imagenet; or a TensorFlow Datasets name such as cifar10. Labels are read from a folder with
    train/<class>/… and test/<class>/…, and from named data sets. From any other folder, 5 % of the images (32 to 2,000)
    are held out to monitor the rank of the features."""
    image_size: Annotated[int | None, POSITIVE] = None
    """Side in pixels of the squares that images are stored as: the shorter side is resized, then the centre is cropped.
    None stores images as they are, unless they have several sizes or more than 4 × 4 global crops of pixels; then it
    takes 8/7 of --crops.global-size."""
    own_statistics: bool = False
    """Whether to normalise by the mean and standard deviation of the training images, instead of --crops.mean and
    --crops.std."""


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """The vision transformer and the projection head."""

    patch_size: Annotated[int, POSITIVE] = 16
    """Side of a patch in pixels."""
    embed_dim: Annotated[int, POSITIVE] = 192
    """Width of the vision transformer (192 is ViT-Tiny)."""
    depth: Annotated[int, POSITIVE] = 12
    """Number of transformer blocks."""
    num_heads: Annotated[int, POSITIVE] = 3
    """Number of attention heads."""
    drop_path_rate: Annotated[float, BELOW_ONE] = 0.1
    """Share of the student's residual branches that are dropped in the last block; it grows linearly from 0 in the
    first."""
    prototypes: Annotated[int, POSITIVE] = 65_536
    """Number of prototypes (K), which is the output width of the head."""
    head_hidden_dim: Annotated[int, POSITIVE] = 2048
    """Width of the head's two hidden layers."""
    bottleneck_dim: Annotated[int, POSITIVE] = 256
    """Width of the head's bottleneck, whose output is compared with the prototypes."""
    norm_last_layer: bool = True
    """Whether to keep the prototypes at length one. Without it, training is faster and less stable."""


@dataclasses.dataclass(frozen=True)
class OptimizationSettings:
    """How the student is trained."""

    epochs: Annotated[int, POSITIVE] = 100
    """Number of passes through the training images."""
    batch_size: Annotated[int, POSITIVE] = 256
    """Images per step. An incomplete last batch of an epoch is dropped."""
    learning_rate: Annotated[float, POSITIVE] = 5e-4
    """Peak learning rate for a batch of 256; it is scaled by batch_size / 256, or by its square root for DINOv2."""
    min_lr: Annotated[float, NOT_NEGATIVE] = 1e-6
    """Learning rate at the end of its cosine schedule."""
    warmup_epochs: int = 10
    """Epochs of linear warm-up of the learning rate."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.04
    """Weight decay at the start."""
    weight_decay_end: Annotated[float, NOT_NEGATIVE] = 0.4
    """Weight decay at the end of its cosine schedule."""
    clip_norm: Annotated[float, NOT_NEGATIVE] = 3.0
    """Largest gradient norm of each parameter tensor, or for DINOv2 of backbone and heads. 0 turns clipping off."""
    freeze_last_layer: Annotated[int, NOT_NEGATIVE] = 1
    """Epochs during which the last layer is frozen."""


@dataclasses.dataclass(frozen=True)
class DistillationSettings:
    """How the teacher follows the student, and how sharp the outputs of both are."""

    teacher_momentum: Annotated[float, PROBABILITY] = 0.996
    """Momentum of the teacher at the start; DINO's authors advise 0.9995 for a batch of 256."""
    teacher_momentum_end: Annotated[float, PROBABILITY] = 1.0
    """Momentum of the teacher at the end of its cosine schedule; the value of --teacher-momentum keeps it constant."""
    warmup_teacher_temp: Annotated[float, POSITIVE] = 0.04
    """Teacher temperature at the start."""
    teacher_temp: Annotated[float, POSITIVE] = 0.04
    """Teacher temperature after warm-up. Lower it if training collapses."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs of linear warm-up of the teacher temperature."""
    student_temp: Annotated[float, POSITIVE] = 0.1
    """Student temperature."""
    center_momentum: Annotated[float, PROBABILITY] = 0.9
    """Momentum of the center, the running mean that is subtracted from the teacher's outputs."""


@dataclasses.dataclass(frozen=True)
class ComputeSettings(DeviceSettings):
    """Number type, memory, speed and devices."""

    dtype: Dtype = "auto"
    """Number type of the networks' computation. auto is float32 on a CPU and bfloat16 on a GPU or TPU; weights stay
    float32."""
    accumulation_steps: Annotated[int, POSITIVE] = 1
    """Number of micro-batches per step. More of them need less memory and give the same step."""
    remat: bool = False
    """Whether to recompute activations in the backward pass instead of storing them. It saves memory on a GPU and takes
    a third more time; on a CPU, save memory by --accumulation-steps instead."""
    prototype_chunk: Annotated[int | None, POSITIVE] = None
    """Number of prototypes whose logits are computed at once; fewer need less memory. None computes all at once."""
    steps_per_dispatch: Annotated[int | None, POSITIVE, UNIMPORTANT] = None
    """Number of steps per call of the compiled program. None takes 1 on a CPU and --log-every on a GPU or TPU."""


@dataclasses.dataclass(frozen=True)
class MonitoringSettings:
    """Evaluation, log and checkpoints."""

    knn_every: Annotated[int, NOT_NEGATIVE] = 10
    """Epochs between two evaluations of the teacher by k-NN and feature rank (RankMe), or by feature rank alone where
    there are no labels. 0 turns them off; those at the end remain."""
    knn_images: Annotated[int, POSITIVE] = 2_000
    """Number of training images that vote in the k-NN during training; a quarter as many others are classified."""
    log_every: Annotated[int, POSITIVE, UNIMPORTANT] = 10
    """Number of steps averaged into one line of metrics.jsonl."""
    checkpoint_minutes: Annotated[float, POSITIVE, UNIMPORTANT] = 10.0
    """Minutes between two checkpoints, which are written at the ends of epochs. A run that stops always writes one."""
    keep: Annotated[int, POSITIVE, UNIMPORTANT] = 2
    """Number of newest checkpoints to keep; the one with the best k-NN accuracy is kept too. Feature rank selects none,
    because a network with a higher rank is not always the better one."""
    minutes: Annotated[float | None, POSITIVE, UNIMPORTANT] = None
    """Minutes after which the run writes a checkpoint and stops; the same command resumes it. None sets no limit."""
    evaluate: Annotated[bool, UNIMPORTANT] = True
    """Whether to evaluate teacher, student and an untrained network by every probe at the end, as
    `experiments.evaluate` does, into the folder evaluation/ of the run. It needs labels."""
    tensorboard: Annotated[bool, UNIMPORTANT] = False
    """Whether to write TensorBoard's files as well (pip install 'dinojax[tensorboard]')."""


@dataclasses.dataclass(frozen=True)
class ResumableRun(ResumableSettings):
    """The random seed, the folders that are written to, and how an interrupted run resumes."""

    out: Annotated[Path | None, UNIMPORTANT] = None
    """Folder of the run, which the same command resumes. None takes runs/<command>/<recipe>-seed<seed>."""
    from_step: Annotated[int | None, NOT_NEGATIVE, UNIMPORTANT] = None
    """Step of the checkpoint to resume from, such as one before training diverged. Settings may then differ from those
    that the run was started with. None resumes from the newest checkpoint, with the same settings."""


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Pretraining by DINO or DINOv2.

    `architecture` and `init_fingerprint` are those of the weights of `start.init`, see `experiments.pretraining.start`.
    """

    dataset: Flags[ImageSettings]
    objective: Flags[MethodSettings] = MethodSettings()
    start: Flags[StartSettings] = StartSettings()
    model: Flags[NetworkSettings] = NetworkSettings()
    crops: MultiCropConfig = dataclasses.field(default_factory=MultiCropConfig)
    training: Flags[OptimizationSettings] = OptimizationSettings()
    distillation: Flags[DistillationSettings] = DistillationSettings()
    compute: Flags[ComputeSettings] = ComputeSettings()
    monitoring: Flags[MonitoringSettings] = MonitoringSettings()
    run: Flags[ResumableRun] = ResumableRun()
    recipe: tyro.conf.Suppress[str] = ""
    command: tyro.conf.Suppress[str] = "dino"
    architecture: tyro.conf.Suppress[tyro.conf.Fixed[ViTConfig | None]] = None
    init_fingerprint: tyro.conf.Suppress[str] = ""

    @property
    def folder(self) -> Path:
        """The run folder."""
        default = Path("runs", self.command, f"{self.recipe}-seed{self.run.seed}")
        return (self.run.out or default).expanduser()

    @property
    def default_image_size(self) -> int:
        """Side of the squares that images are stored as where they cannot be stored as they are."""
        return round(self.crops.global_size * 8 / 7)

    def check(self) -> None:
        """Raises a `UserError` for settings that make no run."""
        check_bounds(self)
        model, crops, epochs, batch_size = self.model, self.crops, self.training.epochs, self.training.batch_size
        warmups = {
            "warmup_epochs": self.training.warmup_epochs,
            "warmup_teacher_temp_epochs": self.distillation.warmup_teacher_temp_epochs,
        }
        for name, value in warmups.items():
            require(0 <= value <= epochs, name, value, f"0 to {epochs} epochs")
        heads, parts, chunk = model.num_heads, self.compute.accumulation_steps, self.compute.prototype_chunk
        require(model.embed_dim % heads == 0, "embed_dim", model.embed_dim, f"a multiple of {heads}")
        require(batch_size % parts == 0, "accumulation_steps", parts, f"a divisor of {batch_size}")
        whole = not chunk or model.prototypes % chunk == 0
        require(whole, "prototype_chunk", chunk, f"a divisor of {model.prototypes}")
        least = min([crops.global_size] + [crops.local_size] * (crops.local_crops > 0))
        require(least >= model.patch_size, "patch_size", model.patch_size, f"at most the crops' {least} px")
        several = crops.global_crops + crops.local_crops > 1
        require(several, "crops.global_crops", crops.global_crops, "2 where there are no local crops")
        self._check_start()
        if self.objective.method == "dinov2":
            self._check_dinov2()

    def _check_start(self) -> None:
        start, epochs = self.start, self.training.epochs
        require(start.heads_warmup < epochs, "heads_warmup", start.heads_warmup, f"less than --epochs {epochs}")
        require(start.stage is None or start.init is not None, "stage", start.stage, "possible without --init")
        if self.start.init is None:
            require(start.heads_warmup == 0, "heads_warmup", start.heads_warmup, "possible without --init")

    def _check_dinov2(self) -> None:
        crops, patch, objective = self.crops, self.model.patch_size, self.objective
        require(crops.global_crops == 2, "crops.global_crops", crops.global_crops, "2, which DINOv2 needs")
        for name in ("global_size", "local_size"):
            size = getattr(crops, name)
            require(size % patch == 0, f"crops.{name}", size, f"a multiple of the patch size {patch}")
        least, most = objective.mask_ratio
        require(0 <= least <= most <= 1, "mask_ratio", f"{least} {most}", "two rising shares from 0 to 1")
        require(crops.global_size >= 2 * patch, "crops.global_size", crops.global_size, f"two patches of {patch} px")
        part = self.training.batch_size // self.compute.accumulation_steps
        require(part > 1 or objective.koleo_weight == 0, "batch_size", part, "2 or more in each part, for KoLeo")
        chunk, prototypes = self.compute.prototype_chunk, objective.patch_prototypes
        whole = not chunk or not prototypes or prototypes % chunk == 0
        require(whole, "prototype_chunk", chunk, f"a divisor of the {prototypes} --patch-prototypes too")


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """What a pretraining gives.

    Attributes:
        folder: of the run.
        test_knn_accuracy: fraction of the test images, for teacher, student and random_init; None without labels, and
            for a run that stopped before its end.
        rank_me: feature rank on the monitored images, for the same networks; None for a run that stopped before its
            end, and for one of an earlier version.
    """

    folder: Path
    test_knn_accuracy: Mapping[str, float] | None
    rank_me: Mapping[str, float] | None = None
