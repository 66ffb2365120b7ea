"""Classifiers on frozen features: dinojax beside PyTorch and scikit-learn, the same work on both sides.

    python -m benchmarks.probes            10 rounds
    python -m benchmarks.probes --quick    5 rounds, under 3 minutes on 2 cores

50,000 training and 10,000 test features of 10 overlapping clusters, 384 wide, in the sweep five tokens of 384. A unit
of work is a part of the whole: some steps of the sweep, one epoch of the MLP, a block of test images (k-NN, k = 200);
the table prints what the whole takes. Each variant also gives its result, and how far the results agree is reported.
All run in float32 with as many threads as there are cores; PyTorch on a GPU where there is one.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.work.paired import CONTROL, Comparison, Variant, compare, finish, has_gpu
from benchmarks.work.probe_work import CLASSES, DIM, KNN_TEST, SWEEP_STEPS, TEST, TOKENS, TRAIN

OURS, TORCH, SKLEARN = "dinojax", "torch", "scikit-learn"


@dataclasses.dataclass(frozen=True)
class Row:
    """A unit of `size` and the whole job, both counted in `of`; and the name of the ratio to each opponent."""

    ratios: dict[str, str]
    size: int
    whole: int
    of: str


ROWS = {
    "sweep": Row({TORCH: "linear sweep, 52 heads"}, SWEEP_STEPS, 12_500, "steps"),
    "mlp": Row({TORCH: "MLP, 25 epochs"}, 1, 25, "epochs"),
    "knn": Row({TORCH: "k-NN vs PyTorch matmul top-k", SKLEARN: "k-NN vs scikit-learn"}, KNN_TEST, TEST, "test images"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Probes, dinojax beside PyTorch and scikit-learn; ends in one line of JSON."""

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

    config = tyro.cli(Config, prog="python -m benchmarks.probes", description=__doc__)
    rounds = 5 if config.quick else config.rounds
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in config.rows:
            variants = _variants(ROWS[name], Path(folder) / "start.npz")
            for _, found in compare(variants, [name], control=OURS, rounds=rounds, progress=_progress):
                rows[name] = _summary(ROWS[name], found)
                print(_table(name, rows[name]), flush=True)
    result = {
        "benchmark": "probes",
        "ratios": {name: ratio["median"] for row in rows.values() for name, ratio in row["ratios"].items()},
        "features": {"train": TRAIN, "test": TEST, "dim": DIM, "tokens": TOKENS, "classes": CLASSES},
        "device": "gpu, float32" if has_gpu() else "cpu, float32",
        "rows": rows,
    }
    finish(result, config.out)


def _progress(text: str) -> None:
    print(text, file=sys.stderr)


def _variants(row: Row, start: Path) -> list[Variant]:
    """Ours first: it writes the initial weights and the minibatches to `start`."""
    functions = {OURS: "jax", TORCH: "torch", SKLEARN: "sklearn"}
    arguments = {"start": str(start)}
    return [
        Variant(name, f"benchmarks.work.probe_work:prepare_{functions[name]}", arguments)
        for name in (OURS, *row.ratios)
    ]


def _summary(row: Row, found: Comparison) -> dict[str, Any]:
    """The numbers of one row; a ratio to each opponent."""
    control = found.ratio(CONTROL, OURS)
    results = {name: info.pop("result") for name, info in found.info.items()}
    variants = {
        name: {
            "unit_seconds": round(found.median(name), 4),
            "whole_seconds": round(found.median(name) * row.whole / row.size, 2),
        }
        | info
        for name, info in found.info.items()
    }
    ratios = {name: found.ratio(OURS, opponent) for opponent, name in row.ratios.items()}
    return {
        "ratios": ratios,
        "control": control,
        **found.verdict(control, *ratios.values()),
        "agreement": {opponent: _agreement(results[OURS], results[opponent]) for opponent in row.ratios},
        "variants": variants,
    }


def _agreement(ours: list, theirs: list) -> str:
    """Neighbours (whole numbers) as sets, since rounding may swap near equals; losses by their difference."""
    import numpy as np

    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if not np.issubdtype(ours.dtype, np.integer):
        return f"largest loss difference {np.abs(ours - theirs).max():.1e} of {np.abs(theirs).max():.3f}"
    shared = sum(len(np.intersect1d(a, b)) for a, b in zip(ours, theirs))
    return f"{shared:,} of {ours.size:,} neighbours the same"


def _table(name: str, summary: dict[str, Any]) -> str:
    row = ROWS[name]
    void = "" if summary["valid"] else " (VOID: the machine is not quiet)"
    lines = [f"\n{name}, control {summary['control']['median']:.2f}{void}"]
    for opponent, title in row.ratios.items():
        ratio = summary["ratios"][title]
        quartiles, agreement = ratio["quartiles"], summary["agreement"][opponent]
        lines.append(f"  {title}: {ratio['median']:.2f}× {opponent}, quartiles {quartiles}; {agreement}")
    lines.append(
        f"  {'variant':16}{f's / {row.size} {row.of}':>22}{f's / {row.whole}':>12}{'compile s':>11}{'peak MiB':>10}"
    )
    for variant, numbers in summary["variants"].items():
        lines.append(
            f"  {variant:16}{numbers['unit_seconds']:22.3f}{numbers['whole_seconds']:12.2f}"
            f"{numbers['compile_seconds']:11.1f}{numbers['peak_mib']:10}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
