"""One supervised training step of ViT-S/14 in every fine-tuning mode: dinojax beside PyTorch, img/s.

    python -m benchmarks.finetune            every mode (10 rounds; on CPU 12 minutes)
    python -m benchmarks.finetune --quick    5 rounds of 112-px images, eager PyTorch only, under 3 minutes on 2 cores

The modes are those of `dinojax.finetune`. linear: SGD on the head; the frozen backbone computes the features of every
batch again, without gradients. finetune: SGD on everything. llrd: AdamW on everything, layer-wise rates, moving
average. lora: AdamW on the attention's low-rank factors and the head. Random normalised images and random labels are
already on the device; augmentation, clipping and drop path are off. PyTorch's side is `transformers` Dinov2, tuned as
far as we could: see `benchmarks.finetune_work`.

Both sides start from the same parameters, and each PyTorch variant first proves that its work is ours: loss, norm of
the gradients, and what two steps make of everything that trains and of its moving average (float32); where they differ
the command stops. On CPU both compute in float32 with as many threads as there are cores, on a GPU in
bfloat16 over float32 parameters. TFLOP/s count the products of a step, for both sides the same: see `Row.flops`.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.work.dino_work import GPU_PROOF_BATCH
from benchmarks.work.paired import (
    CONTROL,
    Comparison,
    Variant,
    compare,
    finish,
    has_gpu,
    table,
    throughput,
)

OURS, EAGER = "dinojax", "torch eager"
MODES = ("linear", "finetune", "llrd", "lora")
CPU_PART = 4  # images whose activations a CPU's cache holds; our step takes a batch in such parts, so PyTorch may too


@dataclasses.dataclass(frozen=True)
class Config:
    """One supervised training step, dinojax beside PyTorch; ends in one line of JSON."""

    quick: bool = False
    """Run 5 rounds with 4 images of 112 px per step (or --batch) against eager PyTorch only. Modes share processes, so
    a row's peak memory includes that of the rows before it."""
    rows: tuple[str, ...] = ()
    """Parts of row names, such as lora or "batch 8": only rows that contain one of them run."""
    batch: tuple[int, ...] = ()
    """Images per step. Empty takes 8 on a CPU, and 32 and 128 on a GPU."""
    rounds: int = 10
    """Number of rounds of the full run."""
    out: Path | None = None
    """File that the JSON is also written to."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters. They do not affect speed; these values make every one of them visible after two steps."""

    learning_rate: float = 2e-3
    weight_decay: float = 0.4
    momentum: float = 0.9
    layer_decay: float = 0.75
    label_smoothing: float = 0.1
    ema_decay: float = 0.1
    lora_rank: int = 8
    lora_alpha: float = 16.0


@dataclasses.dataclass(frozen=True)
class Row:
    """A step of one mode on `batch` images of `size` pixels; the other fields are the architecture, DINOv2 ViT-S/14."""

    mode: str
    size: int
    batch: int
    classes: int = 100
    img_size: int = 518
    patch_size: int = 14
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"{self.mode}, {self.size} px, batch {self.batch}"

    @property
    def recipe(self) -> Recipe:
        """Hyperparameters of the mode's optimizer."""
        return Recipe() if self.adamw else Recipe(learning_rate=0.1, weight_decay=0.01)

    @property
    def adamw(self) -> bool:
        """Whether AdamW trains this mode, not SGD."""
        return self.mode in ("llrd", "lora")

    @property
    def averaged(self) -> bool:
        """Whether the step keeps a moving average of what it trains."""
        return self.mode == "llrd"

    def proof_batch(self, gpu: bool) -> int:
        """Images of the steps that prove equal work."""
        return min(self.batch, GPU_PROOF_BATCH) if gpu else self.batch

    @property
    def flops(self) -> float:
        """Floating-point operations of the products in a step, multiply-adds counted twice.

        An image of T tokens costs forward L (24 T d² + 4 T² d) in the blocks, 6 p² d for each patch in their embedding,
        2 d C in the head. A product whose two inputs need gradients costs twice as much again, one of them once. LoRA
        is counted as x A B beside the frozen x W: attention of rank r adds 2 L T r (6 d) forward.
        """
        dim, patches, depth = self.embed_dim, (self.size // self.patch_size) ** 2, self.depth
        tokens, head = patches + 1, 2 * self.embed_dim * self.classes
        linears, attention = depth * 24 * tokens * dim**2, depth * 4 * tokens**2 * dim
        embedding = 6 * self.patch_size**2 * dim * patches
        if self.mode == "linear":
            return self.batch * (linears + attention + embedding + 2 * head)
        if self.mode != "lora":
            return self.batch * (3 * (linears + attention + head) + 2 * embedding)
        # What enters the first block needs no gradient: neither through x W of q, k and v, nor through x A.
        rank = self.recipe.lora_rank
        factors = 2 * tokens * rank * (depth * 18 * dim - dim)
        linears = 2 * linears - 6 * tokens * dim**2
        return self.batch * (linears + 3 * attention + factors + embedding + 3 * head)

    @property
    def product(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of a typical matrix product: the first of a block's MLP, with at least 2,048 tokens."""
        tokens = self.batch * ((self.size // self.patch_size) ** 2 + 1)
        return (max(tokens, 2048), self.embed_dim), (self.embed_dim, 4 * self.embed_dim)


def main() -> None:
    """Parses the command line, runs every row, prints a table of each and a line of JSON."""
    import tyro

    config = tyro.cli(Config, prog="python -m benchmarks.finetune", description=__doc__)
    gpu = has_gpu()
    batches = config.batch or ((4,) if config.quick else (32, 128) if gpu else (8,))
    rows = [Row(mode, 112 if config.quick else 224, batch) for mode in MODES for batch in batches]
    chosen = [row for row in rows if not config.rows or any(part in row.name for part in config.rows)]
    if not chosen:
        sys.exit(f"no row matches {' or '.join(config.rows)}; the rows are: {'; '.join(row.name for row in rows)}")
    finish(measure(chosen, gpu=gpu, quick=config.quick, rounds=5 if config.quick else config.rounds), config.out)


def measure(works: Sequence[Row], *, gpu: bool, quick: bool, rounds: int) -> dict[str, Any]:
    """Runs the rows in order, prints a table of each, and returns the contents of the JSON."""
    rows = {}
    # Separate processes show each row's own peak memory; a quick run saves the time to start them.
    for group in [works] if quick else [[work] for work in works]:
        by_name = {work.name: work for work in group}
        with tempfile.TemporaryDirectory() as folder:
            variants = _variants(by_name, folder, gpu=gpu, quick=quick)
            for name, found in compare(variants, list(by_name), control=EAGER, rounds=rounds, progress=_progress):
                rows[name] = _summary(by_name[name], found)
                print(table(name, rows[name]), flush=True)
    return {
        "benchmark": "finetune",
        "ratios": {name: row["ratio"]["median"] for name, row in rows.items()},
        "device": "gpu, bfloat16 over float32 parameters" if gpu else "cpu, float32",
        "drop_path": 0.0,
        "rounds": rounds,
        "rows": rows,
    }


def _progress(text: str) -> None:
    print(text, file=sys.stderr)


def _variants(works: Mapping[str, Row], folder: str, *, gpu: bool, quick: bool) -> list[Variant]:
    """Ours comes first: it writes the parameters that the others start from."""
    shared = {"works": {name: dataclasses.asdict(work) for name, work in works.items()}, "start": folder}
    in_parts = all(work.mode != "linear" and work.batch > CPU_PART for work in works.values())
    theirs: dict[str, dict[str, Any]] = {EAGER: {"mode": "eager"}}
    if not quick:
        compiled = ["default", "max-autotune"] if gpu else ["default"]
        theirs |= {f"torch compile {mode}": {"mode": mode} for mode in compiled}
    if gpu and not quick:
        theirs |= {f"{name}, cuDNN attention": options | {"cudnn": True} for name, options in theirs.items()}
    if not gpu and not quick and in_parts:
        theirs |= {f"{name}, in parts of {CPU_PART}": options | {"part": CPU_PART} for name, options in theirs.items()}
    prepare = "benchmarks.finetune_work:prepare_torch"
    return [
        Variant(OURS, "benchmarks.finetune_work:prepare_jax", shared),
        *[Variant(name, prepare, shared | options) for name, options in theirs.items()],
    ]


def _summary(work: Row, found: Comparison) -> dict[str, Any]:
    """The numbers of one row; the ratio is to the fastest PyTorch."""
    baseline = min((name for name in found.seconds if name.startswith("torch")), key=found.median)
    control = found.ratio(CONTROL, EAGER)
    return {
        "ratio": found.ratio(OURS, baseline),
        "baseline": baseline,
        "ratio_to_eager": found.ratio(OURS, EAGER),
        "control": control,
        **found.verdict(control, found.ratio(OURS, baseline)),
        "same_work": found.info[baseline]["same_work"],
        "variants": {n: throughput(work.batch, found.median(n), info, work.flops) for n, info in found.info.items()},
    }


if __name__ == "__main__":
    main()
