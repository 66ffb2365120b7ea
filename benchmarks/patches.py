"""The tasks on patches: dinojax beside a straightforward PyTorch version, on the same features.

    python -m benchmarks.patches            10 rounds
    python -m benchmarks.patches --quick    3 rounds, a minute on 2 cores

Features are 384 wide, as those of ViT-S. match: two photos of 37×37 patches. propagate: one frame of 30×54 patches from
8 others, within 12 patches, 5 largest weights, 3 labels. lost and token_cut: a photo of 37×37 patches. coreset: 500 of
20,000 patches. distances: a photo of 37×37 patches to a bank of 20,000. The PyTorch versions do what the papers' code
does, with whole matrices of similarities. Float32, as many threads as there are cores; how far the results agree is
reported.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.work.paired import CONTROL, Comparison, Variant, compare, finish

OURS, TORCH = "dinojax", "torch"
ROWS = ("match", "propagate", "lost", "token_cut", "coreset", "distances")


@dataclasses.dataclass(frozen=True)
class Config:
    """Tasks on patches, dinojax beside PyTorch; ends in one line of JSON."""

    quick: bool = False
    """Run 3 rounds."""
    rows: tuple[str, ...] = ROWS
    """Tasks to run."""
    rounds: int = 10
    """Number of rounds of the full run."""
    out: Path | None = None
    """File that the JSON is also written to."""


def main() -> None:
    """Parses the command line, runs every task, prints a table and a line of JSON."""
    import tyro

    config = tyro.cli(Config, prog="python -m benchmarks.patches", description=__doc__)
    variants = [Variant(name, f"benchmarks.work.patch_work:prepare_{kind}", {})
                for name, kind in ((OURS, "jax"), (TORCH, "torch"))]  # fmt: skip
    rounds, rows = 3 if config.quick else config.rounds, {}
    print(f"{'task':12}{'ratio':>8}{'quartiles':>18}{'control':>9}{'ours, s':>10}{'PyTorch, s':>12}   results")
    for name, found in compare(variants, config.rows, control=OURS, rounds=rounds, progress=_progress):
        rows[name] = row = _summary(name, found)
        low, high = row["ratio"]["quartiles"]
        times = [row["variants"][one]["unit_seconds"] for one in (OURS, TORCH)]
        void = "" if row["valid"] else " (VOID: the machine is not quiet)"
        print(
            f"{name:12}{row['ratio']['median']:8.2f}{f'{low:.2f} – {high:.2f}':>18}{row['control']['median']:9.2f}"
            f"{times[0]:10.4f}{times[1]:12.4f}   {row['agreement']}{void}",
            flush=True,
        )
    ratios = {name: row["ratio"]["median"] for name, row in rows.items()}
    finish({"benchmark": "patches", "ratios": ratios, "device": "cpu, float32", "rows": rows}, config.out)


def _progress(text: str) -> None:
    print(text, file=sys.stderr)


def _summary(name: str, found: Comparison) -> dict[str, Any]:
    """The numbers of one task."""
    results = {variant: info.pop("result") for variant, info in found.info.items()}
    control = found.ratio(CONTROL, OURS)
    return {
        "ratio": found.ratio(OURS, TORCH),
        "control": control,
        **found.verdict(control, found.ratio(OURS, TORCH)),
        "agreement": agreement(name, results[OURS], results[TORCH]),
        "variants": {variant: {"unit_seconds": round(found.median(variant), 5)} | info
                     for variant, info in found.info.items()},
    }  # fmt: skip


def agreement(name: str, ours: list, theirs: list) -> str:
    """How far two results agree: shared pairs or indices, else the largest difference."""
    if name in ("match", "coreset"):
        pairs = [{tuple(np.atleast_1d(one)) for one in result} for result in (ours, theirs)]
        return f"{len(pairs[0] & pairs[1]):,} of {len(pairs[1]):,} the same"
    difference = np.abs(np.asarray(ours, float) - np.asarray(theirs, float))
    if name in ("lost", "token_cut"):
        return f"{int((difference == 0).sum()):,} of {difference.size:,} patches the same"
    return f"largest difference {difference.max():.1e}"


if __name__ == "__main__":
    main()
