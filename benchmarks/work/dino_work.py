"""What `benchmarks.dino_step` compares: the rows, their inputs, and the proof that both sides do identical work.

The sides are `jax_dino`, `torch_dino` and `pillow_crops` beside this file, each in its own process.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.work.paired import seconds, warmed_up

Arrays = Mapping[str, np.ndarray]
GLOBAL_CROPS, LOCAL_CROPS = 2, 8
PROOF_STEPS, GPU_PROOF_BATCH, PROOF_IMAGES = 2, 32, 16
# Largest relative differences in float32: of the loss and of the norm of all gradients in the first step, and of what
# both steps together add to any tensor, in the Euclidean norm. The teacher moves so little that float32 itself is 1e-2.
BOUNDS = {"loss": 1e-4, "gradient_norm": 1e-3, "student": 3e-3, "teacher": 3e-2, "center": 1e-4}


@dataclasses.dataclass(frozen=True)
class Model:
    """Backbone and head in upstream's words; `img_size` is the side of a global crop."""

    img_size: int
    patch_size: int
    prototypes: int
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    hidden_dim: int = 2048
    bottleneck_dim: int = 256


@dataclasses.dataclass(frozen=True)
class Recipe:
    """DINO's constants. Two steps show all of them: the last layer thaws after one, decay is that of the last step."""

    learning_rate: float = 5e-4
    min_learning_rate: float = 1e-6
    weight_decay: float = 0.4
    teacher_momentum: float = 0.996
    total_steps: int = 10_000
    teacher_temp: float = 0.04
    student_temp: float = 0.1
    center_momentum: float = 0.9
    clip_norm: float = 3.0
    freeze_last_layer_steps: int = 1


@dataclasses.dataclass(frozen=True)
class StepRow:
    """A training step on 2 global and 8 local crops of each of `batch` images, without drop path."""

    model: Model
    local_size: int
    batch: int

    @property
    def name(self) -> str:
        """Name in tables."""
        patch, size, prototypes = self.model.patch_size, self.model.img_size, self.model.prototypes
        return f"vit-ti/{patch} 2x{size}+8x{self.local_size} batch {self.batch}, {prototypes:,} prototypes"

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """How many crops of which side, the global ones first."""
        return (GLOBAL_CROPS, self.model.img_size), (LOCAL_CROPS, self.local_size)

    @property
    def flops(self) -> float:
        """Floating-point operations of the products in a step, multiply-adds counted twice.

        A crop of T tokens costs L (24 T d² + 4 T² d) in the blocks, 6 p² d for each patch in their embedding and
        2 (d h + h² + h b + b K) in the head. The student takes three times the forward pass (twice in the embedding,
        whose input needs no gradient) on all crops, the teacher one on the global crops.
        """
        model, total = self.model, 0.0
        dim, hidden = model.embed_dim, model.hidden_dim
        head = 2 * (dim * hidden + hidden**2 + hidden * model.bottleneck_dim + model.bottleneck_dim * model.prototypes)
        for crops, size in self.groups:
            patches, teacher = (size // model.patch_size) ** 2, size == model.img_size
            blocks = model.depth * (24 * (patches + 1) * dim**2 + 4 * (patches + 1) ** 2 * dim)
            total += crops * ((3 + teacher) * (blocks + head) + (2 + teacher) * 6 * model.patch_size**2 * dim * patches)
        return self.batch * total

    @property
    def product(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of a typical matrix product: the first of a block's MLP, over all global crops."""
        crops, size = self.groups[0]
        tokens = self.batch * crops * ((size // self.model.patch_size) ** 2 + 1)
        return (tokens, self.model.embed_dim), (self.model.embed_dim, 4 * self.model.embed_dim)


@dataclasses.dataclass(frozen=True)
class CropRow:
    """Multi-crop, raw uint8 images to normalised float32 crops: 2 global and 8 local ones of each of `batch` images."""

    source: int
    global_size: int
    local_size: int
    batch: int

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"augmentation {self.source} px to 2x{self.global_size}+8x{self.local_size}"


_SMALL, _LARGE, _GPU = Model(32, 4, 1024), Model(128, 16, 8192), Model(128, 16, 65_536)
QUICK_STEPS = (StepRow(_SMALL, 16, 16),)
CPU_STEPS = (StepRow(_SMALL, 16, 32), StepRow(_LARGE, 64, 16))
GPU_STEPS = (StepRow(_GPU, 64, 256), StepRow(_GPU, 64, 1024))
CROPS = (CropRow(32, 32, 16, 256), CropRow(64, 64, 32, 128), CropRow(128, 128, 64, 32))
ROWS = {row.name: row for row in (*QUICK_STEPS, *CPU_STEPS, *GPU_STEPS, *CROPS)}


def random_crops(row: StepRow, batch: int) -> list[np.ndarray]:
    """Groups of crops [crops, batch, height, width, 3], standard normal."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((crops, batch, size, size, 3), np.float32) for crops, size in row.groups]


def pictures(count: int, size: int) -> np.ndarray:
    """uint8[count, size, size, 3] with the spectrum of photographs, amplitude 1 / frequency, and some noise."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    spectrum = np.fft.rfft2(rng.standard_normal((count, 3, size, size))) / np.maximum(frequency, 1 / size)
    fields = np.fft.irfft2(spectrum, (size, size))
    fields = fields + 2 * fields.mean(1, keepdims=True)  # the channels of a photograph resemble each other
    fields = (fields - fields.mean((1, 2, 3), keepdims=True)) / fields.std((1, 2, 3), keepdims=True)
    values = 128 + 55 * fields + rng.normal(0, 4, fields.shape)
    return np.ascontiguousarray(values.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def first_steps(trainer: Any, groups: Any) -> tuple[Arrays, float]:
    """What `PROOF_STEPS` steps give, and the seconds of the first; either side's `Trainer`."""
    outcomes: list[Any] = []
    first = seconds(lambda: outcomes.append([float(x) for x in trainer.step(groups)]))
    outcomes += [[float(x) for x in trainer.step(groups)] for _ in range(PROOF_STEPS - 1)]
    loss, norm = np.array(outcomes).T
    return {"loss": loss, "gradient_norm": norm} | trainer.parameters(), first


def differences(initial: Arrays, ours: Arrays, theirs: Arrays) -> dict[str, float]:
    """How far two sides are apart after the same steps, relatively; see `BOUNDS`.

    Args:
        initial: parameters before the first step.
        ours: "loss" and "gradient_norm" of each step, "center", and parameters under "student.…" and "teacher.…".
        theirs: the same of the other side.

    Raises:
        RuntimeError: further apart than rounding explains, so the work is not the same.
    """
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"the work differs: only one side has {sorted(ours.keys() ^ theirs.keys())}")
    found = {name: abs(float(theirs[name][0] / ours[name][0]) - 1) for name in ("loss", "gradient_norm")}
    for name in sorted(ours.keys() - found.keys()):
        which, _, parameter = name.partition(".")
        start = initial[parameter] if parameter else 0.0
        a, b = (_without_key_bias(name, side[name] - start) for side in (ours, theirs))
        distance = np.linalg.norm(a - b) / (np.linalg.norm(a) or 1)
        found[which] = max(found.get(which, 0.0), float(distance))
    wrong = {name: value for name, value in found.items() if not value <= BOUNDS[name]}
    if wrong:
        raise RuntimeError(f"the work differs: relative differences {wrong} beyond the bounds {BOUNDS}")
    return {name: float(f"{value:.1e}") for name, value in found.items()}


def _without_key_bias(name: str, change: np.ndarray) -> np.ndarray:
    """Its gradient is zero in exact arithmetic, and AdamW makes real steps of what rounding leaves of it."""
    return np.delete(change, np.s_[len(change) // 3 : 2 * len(change) // 3]) if "qkv.bias" in name else change


def product_tflops(row: StepRow, product: Callable[[], Any]) -> float:
    """The rate of `row.product` alone."""
    (tokens, dim), (_, hidden) = row.product
    return round(2 * tokens * dim * hidden / min(warmed_up(product).unit_seconds for _ in range(5)) / 1e12, 3)
