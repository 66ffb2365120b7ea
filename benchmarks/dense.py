"""Dense heads: dinojax beside straightforward PyTorch, the same work on the same features.

    python -m benchmarks.dense            10 rounds
    python -m benchmarks.dense --quick    5 rounds, under 2 minutes on 2 cores

masks: a training step of a segmentation head (16 windows of 32 × 32 patches of ViT-S, masks of 448 × 448 px, 21
classes). depth: the same with a depth head of 64 bins. photo: from the scores of the patches of a 12-megapixel photo to
the class of each pixel. The losses of the first three steps, and the classes, are compared. Both sides compute in
float32 with as many threads as there are cores.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from benchmarks.work.dense_work import BINS, CLASSES, PATCHES, PHOTO, PIXELS, WIDTH, WINDOWS
from benchmarks.work.paired import CONTROL, Comparison, Variant, compare, finish

OURS, TORCH = "dinojax", "torch"
ROWS = {"masks": "segmentation step", "depth": "depth step", "photo": "mask of a 12-megapixel photo"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Dense heads, dinojax beside PyTorch; ends in one line of JSON."""

    quick: bool = False
    """Run 5 rounds."""
    rows: tuple[str, ...] = tuple(ROWS)
    """Rows to run."""
    rounds: int = 10
    """Number of rounds of the full run."""
    out: Path | None = None
    """File that the JSON is also written to."""


def main() -> None:
    """Parses the command line, runs every row, prints a table and a line of JSON."""
    import tyro

    config = tyro.cli(Config, prog="python -m benchmarks.dense", description=__doc__)
    variants = [Variant(name, f"benchmarks.work.dense_work:prepare_{function}", {})
                for name, function in ((OURS, "jax"), (TORCH, "torch"))]  # fmt: skip
    rounds, rows = 5 if config.quick else config.rounds, {}
    for row, found in compare(variants, config.rows, control=OURS, rounds=rounds, progress=_progress):
        rows[ROWS[row]] = summary = _summary(found)
        void = "" if summary["valid"] else " (VOID: the machine is not quiet)"
        print(
            f"{ROWS[row]}: {summary['ratio']['median']:.2f}× PyTorch, quartiles {summary['ratio']['quartiles']}, "
            f"control {summary['control']['median']:.2f}{void}; {summary['agreement']}",
            flush=True,
        )
        for name, numbers in summary["variants"].items():
            print(f"  {name:14}{numbers['seconds']:9.4f} s  {numbers['peak_mib']:6} MiB", flush=True)
    sizes = {"windows": WINDOWS, "patches": PATCHES, "width": WIDTH, "classes": CLASSES, "pixels": PIXELS, "bins": BINS}
    result = {
        "benchmark": "dense",
        "ratios": {name: row["ratio"]["median"] for name, row in rows.items()},
        "sizes": {**sizes, "photo": PHOTO},
        "rows": rows,
    }
    finish(result, config.out)


def _progress(text: str) -> None:
    print(text, file=sys.stderr)


def _summary(found: Comparison) -> dict[str, Any]:
    control = found.ratio(CONTROL, OURS)
    results = {name: info.pop("result") for name, info in found.info.items()}
    return {
        "ratio": found.ratio(OURS, TORCH),
        "control": control,
        **found.verdict(control, found.ratio(OURS, TORCH)),
        "agreement": _agreement(results[OURS], results[TORCH]),
        "variants": {name: {"seconds": round(found.median(name), 4), **info} for name, info in found.info.items()},
    }


def _agreement(ours: list, theirs: list) -> str:
    """Losses by their largest difference, classes by how many are the same."""
    if isinstance(ours[0], float):
        return f"largest loss difference {max(abs(a - b) for a, b in zip(ours, theirs)):.1e} of {max(theirs):.3f}"
    return f"{sum(a == b for a, b in zip(ours, theirs)):,} of {len(ours):,} classes the same"


if __name__ == "__main__":
    main()
