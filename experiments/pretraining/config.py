"""The settings of a DINO pretraining run, and the networks, schedules and steps that they stand for."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from dinojax.pretraining.augment import MultiCropConfig
from experiments.runs.settings import require, require_positive

# Settings that do not change what is learnt: a run goes on under other values of these.
FREE = {
    *("out", "data_dir", "cache_dir", "minutes", "log_every", "checkpoint_minutes", "keep", "evaluate", "tensorboard"),
    "steps_per_dispatch",
}


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """DINO pretraining; see the top of the command's file."""

    data: str
    """"digits" (inside scikit-learn, no download), a TensorFlow Datasets name such as cifar10 or cifar100,
    tiny_imagenet, or a folder with train/<class>/… and test/<class>/… The labels serve the k-NN alone."""
    data_dir: Path | None = None
    """Where TensorFlow Datasets keeps its files and where tiny-imagenet-200 was extracted."""
    max_train: int | None = None
    """Learn from only this many training images, drawn from every class in proportion."""
    max_test: int | None = None
    """Likewise for the test images of the k-NN."""
    image_size: int | None = None
    """Pixels. Images of different sizes are stored as squares of this side: resized, then cut around the centre."""
    out: Path | None = None
    """The run folder. Default: runs/<command>/<recipe>-seed<seed>. The same command goes on with what is in it."""
    seed: int = 0
    """Of the weights, the order of the images, their views, and drop path."""

    patch_size: int = 16
    """Side of a patch in pixels."""
    embed_dim: int = 192
    """Width of the vision transformer (192 is ViT-Tiny)."""
    depth: int = 12
    """Its blocks."""
    num_heads: int = 3
    """Its attention heads."""
    drop_path_rate: float = 0.1
    """Share of the student's residual branches that are dropped in the last block; linear from 0 in the first."""
    prototypes: int = 65_536
    """K, the width of the head's output."""
    head_hidden_dim: int = 2048
    """Width of the head's two hidden layers."""
    bottleneck_dim: int = 256
    """Width of what the head compares with the prototypes."""
    norm_last_layer: bool = True
    """Keep the prototypes' lengths at one; without it training is faster and less stable."""

    crops: MultiCropConfig = dataclasses.field(default_factory=MultiCropConfig)
    """The views."""
    own_statistics: bool = False
    """Normalise by the training images' own mean and deviation, in place of the views'."""

    epochs: int = 100
    """Passes through the images."""
    batch_size: int = 256
    """Images a step; what is left of an epoch is dropped."""
    learning_rate: float = 5e-4
    """Peak, for a batch of 256: it is scaled by batch_size / 256."""
    min_lr: float = 1e-6
    """Where the cosine of the learning rate ends."""
    warmup_epochs: int = 10
    """In which the learning rate rises linearly from 0."""
    weight_decay: float = 0.04
    """At the start."""
    weight_decay_end: float = 0.4
    """At the end of its cosine."""
    clip_norm: float = 3.0
    """Largest norm of each tensor's gradient; 0 does not clip."""
    freeze_last_layer: int = 1
    """Epochs in which the prototypes rest."""
    teacher_momentum: float = 0.996
    """Weight of the old teacher at the start; 0.9995 is the authors' advice for a batch of 256."""
    teacher_momentum_end: float = 1.0
    """At the end of its cosine; the value of teacher_momentum keeps it constant."""
    warmup_teacher_temp: float = 0.04
    """The teacher's temperature at first."""
    teacher_temp: float = 0.04
    """And after its linear warm-up; lower it where training collapses."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs of that warm-up."""
    student_temp: float = 0.1
    """The student's temperature."""
    center_momentum: float = 0.9
    """Weight of the old center."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the networks compute in; auto is float32 on a CPU and bfloat16 elsewhere. Weights stay float32."""
    accumulation_steps: int = 1
    """Parts of the batch that follow each other: less memory, the same step."""
    remat: bool = False
    """Compute activations again for the gradient in place of keeping them, for a third more time. On a GPU it saves
    memory; XLA:CPU keeps them all the same, and accumulation_steps saves it there."""
    prototype_chunk: int | None = None
    """Form the logits so many prototypes at a time: less memory."""
    steps_per_dispatch: int | None = None
    """Steps in one call of the compiled program. Default: 1 on a CPU, log_every elsewhere."""

    knn_every: int = 10
    """Epochs between two k-NN accuracies and feature ranks; 0 for none before the end."""
    knn_images: int = 2_000
    """Training images that vote in these; a quarter as many others are classified."""
    log_every: int = 10
    """Steps that one line of metrics.jsonl is the mean of."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints, at the ends of epochs; there is always one when a run stops."""
    keep: int = 2
    """Newest checkpoints that are kept; the one of the best k-NN is kept as well."""
    minutes: float | None = None
    """Stop after so long, with a checkpoint; the same command goes on."""
    evaluate: bool = True
    """In the end, judge teacher, student and the untrained network by every probe, as `experiments.evaluate` does, in
    the folder evaluation/ of the run."""
    cache_dir: Path = Path("~/.cache/dinojax")
    """Where the features of that evaluation are kept."""
    tensorboard: bool = False
    """Also write TensorBoard's files (pip install 'dinojax[tensorboard]')."""
    recipe: tyro.conf.Suppress[str] = ""
    command: tyro.conf.Suppress[str] = "dino"

    def check(self) -> None:
        """Raises a `UserError` for settings that make no run."""
        positive = (
            *("max_train", "max_test", "image_size", "patch_size", "embed_dim", "depth", "num_heads", "prototypes"),
            *("head_hidden_dim", "bottleneck_dim", "epochs", "batch_size", "learning_rate", "warmup_teacher_temp"),
            *("teacher_temp", "student_temp", "accumulation_steps", "prototype_chunk", "steps_per_dispatch"),
            *("knn_images", "log_every", "checkpoint_minutes", "keep", "minutes"),
        )
        require_positive(self, positive)
        for name in ("min_lr", "weight_decay", "weight_decay_end", "clip_norm", "freeze_last_layer", "knn_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in ("teacher_momentum", "teacher_momentum_end", "center_momentum"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        require(0 <= self.drop_path_rate < 1, "drop_path_rate", self.drop_path_rate, "0 or more and below 1")
        for name in ("warmup_epochs", "warmup_teacher_temp_epochs"):
            require(0 <= getattr(self, name) <= self.epochs, name, getattr(self, name), f"0 to {self.epochs} epochs")
        require(self.embed_dim % self.num_heads == 0, "embed_dim", self.embed_dim, f"a multiple of {self.num_heads}")
        parts, chunk = self.accumulation_steps, self.prototype_chunk
        require(self.batch_size % parts == 0, "accumulation_steps", parts, f"a divisor of {self.batch_size}")
        require(not chunk or self.prototypes % chunk == 0, "prototype_chunk", chunk, f"a divisor of {self.prototypes}")
        sizes = [self.crops.global_size] + [self.crops.local_size] * (self.crops.local_crops > 0)
        require(min(sizes) >= self.patch_size, "patch_size", self.patch_size, f"at most the crops' {min(sizes)} px")
        crops = self.crops.global_crops + self.crops.local_crops
        require(crops > 1, "crops.global_crops", self.crops.global_crops, "2 where there are no local crops")
