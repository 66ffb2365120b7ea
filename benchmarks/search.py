"""How long exact search and the comparison of all pairs take, on random features.

    python -m benchmarks.search            10,000, 100,000 and 1,000,000 images; all pairs up to 100,000
    python -m benchmarks.search --quick    10,000 and 100,000 images; all pairs of 10,000

The features are 384 wide, as those of ViT-S. A search for the 10 nearest images takes one photo, or 100 at once, and
includes moving the bank to the device. Each number is the median of the runs after a first one, which also compiles.
"""

import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.work.paired import finish, seconds

DIM, K = 384, 10


@dataclasses.dataclass(frozen=True)
class Config:
    """Seconds of exact search; ends in one line of JSON."""

    quick: bool = False
    """Measure small banks alone."""
    banks: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Images of each bank."""
    most_pairs: int = 100_000
    """Images of the largest bank whose pairs are all compared."""
    runs: int = 5
    """Runs of each search."""
    out: Path | None = None
    """File that the JSON is also written to."""


def main() -> None:
    """Parses the command line, measures every bank, prints a table and a line of JSON."""
    import tyro

    config = tyro.cli(Config, prog="python -m benchmarks.search", description=__doc__)
    banks = [count for count in config.banks if count <= 100_000] if config.quick else config.banks
    pairs = min(config.most_pairs, 10_000) if config.quick else config.most_pairs
    rows = {}
    print(f"{'images':>12}{'1 photo, s':>14}{'100 photos, s':>16}{'all pairs, s':>15}")
    for count in banks:
        rows[str(count)] = row = _measure(count, config.runs, all_pairs=count <= pairs)
        pairs_seconds = f"{row['all_pairs']:.1f}" if "all_pairs" in row else ""
        print(f"{count:12,}{row['one_photo']:14.3f}{row['hundred_photos']:16.3f}{pairs_seconds:>15}", flush=True)
    import jax

    finish(
        {"benchmark": "search", "dim": DIM, "k": K, "device": jax.devices()[0].device_kind, "rows": rows}, config.out
    )


def _measure(count: int, runs: int, *, all_pairs: bool) -> dict[str, Any]:
    import numpy as np

    from dinojax.retrieval import nearest, similar_groups

    rng = np.random.default_rng(0)
    bank, queries = (rng.standard_normal((rows, DIM), dtype=np.float32) for rows in (count, 100))
    row = {}
    for name, photos in (("one_photo", queries[:1]), ("hundred_photos", queries)):
        print(f"{count:,} images, {name}", file=sys.stderr)
        times = [seconds(lambda photos=photos: nearest(bank, photos, K)) for _ in range(runs + 1)][1:]
        row[name], row[f"{name}_range"] = round(statistics.median(times), 4), [round(f(times), 4) for f in (min, max)]
    if all_pairs:
        print(f"{count:,} images, all pairs", file=sys.stderr)
        row["all_pairs"] = round(seconds(lambda: similar_groups(bank, 0.97)), 2)
    return row


if __name__ == "__main__":
    main()
