"""What a step costs: wall-clock seconds and the peak of the process's memory above what it held before."""

import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATM = Path("/proc/self/statm")
_SAMPLING_SECONDS = 0.005
PEAK_MEMORY = (
    "resident memory of the process on the host at its highest, less what it was before the step, sampled every 5 ms"
)


@dataclasses.dataclass
class Cost:
    """Seconds and MiB (None where the system does not tell), set when the step is over."""

    seconds: float = 0.0
    peak_mib: float | None = None


@contextmanager
def measured() -> Iterator[Cost]:
    """Measures the body; compilation counts, and so does whatever other threads allocate meanwhile."""
    cost, done, samples = Cost(), threading.Event(), [_resident_mib()]

    def sample() -> None:
        while not done.wait(_SAMPLING_SECONDS):
            samples.append(_resident_mib())

    sampler = threading.Thread(target=sample, name="memory", daemon=True)
    if samples[0] is not None:
        sampler.start()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        done.set()
        if samples[0] is not None:
            sampler.join()
            cost.peak_mib = max([*samples, _resident_mib()]) - samples[0]


def _resident_mib() -> float | None:
    """Linux alone says it without another library."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return None
