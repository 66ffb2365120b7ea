"""The training steps of DINO and DINOv2, and the augmentation alone: dinojax beside PyTorch and Pillow, img/s.

    python -m benchmarks.dino_step            every row (10 rounds; on CPU 12 minutes, and more for DINOv2)
    python -m benchmarks.dino_step --quick    5 rounds of fewer and smaller rows, under 3 minutes on 2 cores
    python -m benchmarks.dino_step --rows dinov2    the DINOv2 row alone

A step is: student and teacher on 2 global and 8 local crops, loss, gradients, clipping of each tensor, AdamW, moving
averages of teacher and center. Both sides start from the same parameters and see the same random crops, already on the
device, and each PyTorch variant first proves that its work is ours: loss, norm of the gradients, and what two steps
make of student, teacher and center (float32); where they differ the command stops. On CPU both compute in
float32 with as many threads as there are cores. On a GPU both compute in bfloat16 over float32 parameters, and ours
runs DINO a second time from raw uint8 images, its augmentation inside the step.

A step of DINOv2 takes masks of the global crops besides. Its loss is that of class tokens with targets by
Sinkhorn-Knopp, that of masked patches, which share the head, and KoLeo. Backbone and head are each clipped by their
norm, and learning rates fall from the last block to the first. PyTorch's batch brings the places of the masked patches
along, and its head takes just these; ours finds them inside the step, and its head takes as many rows as such masks can
have.

The augmentation rows take raw uint8 images to normalised crops: our compiled program on all cores or the GPU, Pillow
in one thread. Pillow first repeats crops that ours drew, and they must be equal. TFLOP/s count the products of a
step, see `StepRow.flops` and `DINOv2Row.flops`.
"""

import dataclasses
import importlib.metadata
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.work.dino_work import CPU_STEPS, CROPS, GPU_STEPS, QUICK_STEPS, CropRow, StepRow
from benchmarks.work.dinov2_work import DINOV2_CPU, DINOV2_GPU, DINOV2_QUICK, DINOv2Row
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

Row = StepRow | DINOv2Row | CropRow
OURS, FROM_PIXELS, PILLOW, EAGER = "dinojax", "dinojax from uint8", "pillow, 1 thread", "torch eager"


@dataclasses.dataclass(frozen=True)
class Config:
    """The steps of DINO and DINOv2 beside PyTorch, the augmentation beside Pillow; ends in one line of JSON."""

    quick: bool = False
    """Run 5 rounds of fewer and smaller rows against eager PyTorch only."""
    rows: tuple[str, ...] = ()
    """Parts of row names, such as augmentation, dinov2 or 2x128: only rows that contain one of them run."""
    rounds: int = 10
    """Number of rounds of the full run."""
    out: Path | None = None
    """File that the JSON is also written to."""


def main() -> None:
    """Parses the command line, runs every row, prints a table of each and a line of JSON."""
    import tyro

    config = tyro.cli(Config, prog="python -m benchmarks.dino_step", description=__doc__)
    gpu = has_gpu()
    rows, ratios = {}, {}
    for work in _chosen(config, gpu=gpu):
        found = _measured(work, gpu=gpu, quick=config.quick, rounds=5 if config.quick else config.rounds)
        rows[work.name] = _summary(work, found)
        print(table(work.name, rows[work.name]), flush=True)
        ratios[work.name] = rows[work.name]["ratio"]["median"]
        if gpu and isinstance(work, StepRow):
            ratios[f"{work.name}, from uint8"] = rows[work.name]["ratio_from_uint8"]["median"]
    result = {
        "benchmark": "dino_step",
        "ratios": ratios,
        "device": "gpu; steps in bfloat16, other float32 products of PyTorch in TF32" if gpu else "cpu, float32",
        "pillow": importlib.metadata.version("pillow"),
        "rows": rows,
    }
    finish(result, config.out)


def _chosen(config: Config, *, gpu: bool) -> list[Row]:
    steps = GPU_STEPS if gpu else QUICK_STEPS if config.quick else CPU_STEPS
    dinov2 = DINOV2_GPU if gpu else DINOV2_QUICK if config.quick else DINOV2_CPU
    rows = [*(steps[:1] if config.quick else steps), *dinov2, *(CROPS[:2] if config.quick else CROPS)]
    chosen = [row for row in rows if not config.rows or any(part in row.name for part in config.rows)]
    if not chosen:
        sys.exit(f"no row matches {' or '.join(config.rows)}; the rows are: {'; '.join(row.name for row in rows)}")
    return chosen


def _measured(work: Row, *, gpu: bool, quick: bool, rounds: int) -> list[tuple[str, Comparison]]:
    """Comparisons with the names of their controls, one for each group of variants that run side by side."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            (control, comparison)
            for control, variants in _groups(work, {"start": folder}, gpu=gpu, quick=quick)
            for _, comparison in compare(variants, [work.name], control=control, rounds=rounds, progress=_progress)
        ]


def _progress(text: str) -> None:
    print(text, file=sys.stderr)


def _groups(work: Row, start: dict[str, Any], *, gpu: bool, quick: bool) -> list[tuple[str, list[Variant]]]:
    """The control and the variants of each group; ours comes first: it writes the parameters that the others load."""
    if isinstance(work, CropRow):
        pillow = Variant(PILLOW, "benchmarks.work.pillow_crops:prepare", start)
        return [(PILLOW, [Variant(OURS, "benchmarks.work.jax_dino:prepare_crops", start), pillow])]
    dinov2 = isinstance(work, DINOv2Row)
    ours = [Variant(OURS, f"benchmarks.work.jax_dino:prepare_{'dinov2_' if dinov2 else ''}step", start)]
    if gpu and not dinov2:
        ours.append(Variant(FROM_PIXELS, ours[0].prepare, start | {"raw": True}))
    modes = ["eager", *([] if quick else ["default", "max-autotune"] if gpu else ["default"])]
    torch = [
        Variant(
            f"torch {'' if mode == 'eager' else 'compile '}{mode}{', cuDNN attention' if cudnn else ''}",
            f"benchmarks.work.torch_dino{'v2' if dinov2 else ''}:prepare",
            start | {"mode": mode, "cudnn": cudnn},
        )
        for cudnn in ([False, True] if gpu and not quick else [False])
        for mode in modes
    ]
    # All of them together do not fit the memory of a GPU.
    return [(OURS, [*ours, variant]) for variant in torch] if gpu else [(EAGER, [*ours, *torch])]


def _summary(work: Row, found: Sequence[tuple[str, Comparison]]) -> dict[str, Any]:
    """The numbers of one row; ratios are to the fastest opponent, over the rounds in which it took part."""
    opponents = {name: pair for pair in found for name in pair[1].seconds if name.startswith(("torch", "pillow"))}
    baseline = min(opponents, key=lambda name: opponents[name][1].median(name))
    control_name, best = opponents[baseline]
    control = best.ratio(CONTROL, control_name)
    where = {name: comparison for _, comparison in found for name in comparison.seconds} | dict.fromkeys(
        best.seconds, best
    )
    flops = None if isinstance(work, CropRow) else work.flops
    return {
        "ratio": best.ratio(OURS, baseline),
        "baseline": baseline,
        **({"ratio_from_uint8": best.ratio(FROM_PIXELS, baseline)} if FROM_PIXELS in best.seconds else {}),
        **({"ratio_to_eager": best.ratio(OURS, EAGER)} if EAGER in best.seconds else {}),
        "control": control,
        **best.verdict(control, best.ratio(OURS, baseline)),
        "same_work": best.info[baseline]["same_work"],
        "variants": {name: throughput(work.batch, c.median(name), c.info[name], flops) for name, c in where.items()},
    }


if __name__ == "__main__":
    main()
