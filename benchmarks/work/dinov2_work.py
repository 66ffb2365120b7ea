"""What the DINOv2 rows of `benchmarks.dino_step` compare: the rows, their inputs and their constants.

The sides are `jax_dino` and `torch_dinov2` beside this file, and `dino_work` proves that they do identical work.
"""

import dataclasses

import numpy as np

from benchmarks.work.dino_work import GLOBAL_CROPS, LOCAL_CROPS, Model

# DINOv2's defaults: half of the global crops are masked, and a mask covers a tenth to a half of the patches.
MASKED_CROPS, MASK_SHARES = 0.5, (0.1, 0.5)
KOLEO_WEIGHT = 0.1
# LayerScale starts at 1e-5 in DINOv2. Class tokens would then be equal but for rounding, and so KoLeo's neighbours.
LAYER_SCALE = 1.0


@dataclasses.dataclass(frozen=True)
class DINOv2Recipe:
    """DINOv2's constants, except that clipping sets in at 0.3 instead of 3, so that the proof sees it in both parts.

    Two steps show all of them: the last layer thaws after one.
    """

    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-6
    weight_decay: float = 0.04
    last_weight_decay: float = 0.4
    teacher_momentum: float = 0.992
    total_steps: int = 10_000
    teacher_temp: float = 0.04
    student_temp: float = 0.1
    koleo_weight: float = KOLEO_WEIGHT
    patch_weight: float = 1.0
    clip_norm: float = 0.3
    layer_decay: float = 0.9
    patch_embed_factor: float = 0.2
    freeze_last_layer_steps: int = 1


@dataclasses.dataclass(frozen=True)
class DINOv2Row:
    """A step of DINOv2 on 2 global and 8 local crops of each of `batch` images.

    Targets by Sinkhorn-Knopp, one head for class tokens and masked patches, KoLeo, LayerScale, without drop path.
    """

    arch: str
    """Name of the architecture, with its patch size."""
    model: Model
    local_size: int
    batch: int

    @property
    def name(self) -> str:
        """Name in tables."""
        crops = f"2x{self.model.img_size}+8x{self.local_size}"
        return f"dinov2 {self.arch} {crops} batch {self.batch}, {self.model.prototypes:,} prototypes"

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """How many crops of which side, the global ones first."""
        return (GLOBAL_CROPS, self.model.img_size), (LOCAL_CROPS, self.local_size)

    @property
    def side(self) -> int:
        """Patches along a side of a global crop."""
        return self.model.img_size // self.model.patch_size

    @property
    def flops(self) -> float:
        """Floating-point operations of the products in a step, multiply-adds counted twice.

        Backbone and head are counted as in `StepRow.flops`. The head's rows are class tokens and masked patches, as
        many as there are: rows that only fill up an array are no work. KoLeo compares B images with 2 B² d for each
        global crop.
        """
        model, total = self.model, 0.0
        dim, hidden = model.embed_dim, model.hidden_dim
        for crops, size in self.groups:
            patches, teacher = (size // model.patch_size) ** 2, size == model.img_size
            blocks = model.depth * (24 * (patches + 1) * dim**2 + 4 * (patches + 1) ** 2 * dim)
            embedding = 6 * model.patch_size**2 * dim * patches
            total += self.batch * crops * ((3 + teacher) * blocks + (2 + teacher) * embedding)
        masked = int(mask_sizes(self, self.batch).sum())
        student, teacher = (self.batch * crops + masked for crops in (GLOBAL_CROPS + LOCAL_CROPS, GLOBAL_CROPS))
        head = 2 * (dim * hidden + hidden**2 + hidden * model.bottleneck_dim + model.bottleneck_dim * model.prototypes)
        return total + (3 * student + teacher) * head + GLOBAL_CROPS * 2 * self.batch**2 * dim

    @property
    def product(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of a typical matrix product: the first of a block's MLP, over all global crops."""
        tokens = self.batch * GLOBAL_CROPS * (self.side**2 + 1)
        return (tokens, self.model.embed_dim), (self.model.embed_dim, 4 * self.model.embed_dim)


DINOV2_QUICK = (DINOv2Row("vit-ti/4 of 4 blocks,", Model(32, 4, 1024, depth=4), 16, 16),)
DINOV2_CPU = (DINOv2Row("vit-s/14", Model(98, 14, 8192, embed_dim=384, num_heads=6), 42, 16),)
DINOV2_GPU = (DINOv2Row("vit-s/14", Model(224, 14, 65_536, embed_dim=384, num_heads=6), 98, 64),)
DINOV2_ROWS = {row.name: row for row in (*DINOV2_QUICK, *DINOV2_CPU, *DINOV2_GPU)}


def mask_sizes(row: DINOv2Row, batch: int) -> np.ndarray:
    """How many patches each mask covers: the middles of the equal parts from which DINOv2 draws the shares."""
    edges = np.linspace(*MASK_SHARES, int(GLOBAL_CROPS * batch * MASKED_CROPS) + 1)
    return np.floor(row.side**2 * (edges[1:] + edges[:-1]) / 2).astype(int)


def random_masks(row: DINOv2Row, batch: int) -> np.ndarray:
    """Masks bool[2, batch, patches] of random patches in half of the global crops; blocks would take the same time."""
    rng, sizes, crops = np.random.default_rng(1), mask_sizes(row, batch), GLOBAL_CROPS * batch
    masks = np.zeros((crops, row.side**2), bool)
    for crop, size in zip(rng.permutation(crops), sizes):
        masks[crop, rng.permutation(row.side**2)[:size]] = True
    return masks.reshape(GLOBAL_CROPS, batch, -1)
