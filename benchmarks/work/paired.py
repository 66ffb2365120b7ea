"""How two programs are compared: one process each, taking turns, so that noise of the machine affects both equally.

A variant is a function `prepare(row=…, **arguments) -> Prepared` in a module that only its own process imports: PyTorch
and JAX never share one. For each row of a benchmark the parent process asks the variants in turn for one timed stretch
of work, in an order that changes from round to round, and takes the median of the ratios within the rounds. One variant
runs twice, the second time under another name. A row is void if that ratio of a variant to itself is not near one, if
the quartiles of a ratio lie far apart, or if other processes were busy meanwhile.

Every variant keeps the memory it frees, as our training commands do. On a CPU both sides would otherwise spend part of
each step on new pages, how much depends on what the other processes hold, and the control reads anything up to 1.1.
"""

import dataclasses
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from experiments.runs.host_memory import keep_freed_memory

ROOT = Path(__file__).parents[2]
CONTROL = "A/A control"
CONTROL_BOUND = 0.05
QUARTILE_BOUND = 0.15
FOREIGN_BOUND = 0.05
STRETCH_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A variant that is warmed up: `run` does one unit of work and waits for its end."""

    run: Callable[[], Any]
    compile_seconds: float
    unit_seconds: float
    info: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A name and where its `prepare` is, as "module:function"."""

    name: str
    prepare: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Seconds per unit of every round by variant, and what the variants report about themselves.

    `foreign_share` is the part of the machine's cores that other processes took meanwhile.
    """

    seconds: dict[str, list[float]]
    info: dict[str, dict[str, Any]]
    foreign_share: float = 0.0

    def median(self, name: str) -> float:
        """Median seconds per unit."""
        return statistics.median(self.seconds[name])

    def ratio(self, ours: str, theirs: str) -> dict[str, float]:
        """How many times faster `ours` is: median over rounds, quartiles, and the ratio of the two fastest rounds."""
        ratios = [b / a for a, b in zip(self.seconds[ours], self.seconds[theirs])]
        low, _, high = statistics.quantiles(ratios, n=4)
        return {
            "median": round(statistics.median(ratios), 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "min_over_min": round(min(self.seconds[theirs]) / min(self.seconds[ours]), 3),
        }

    def verdict(self, control: dict[str, Any], *ratios: dict[str, Any]) -> dict[str, Any]:
        """Whether the ratios count, as JSON: `valid`, and the share that foreign processes took."""
        together = all(
            abs(quartile / ratio["median"] - 1) <= QUARTILE_BOUND for ratio in ratios for quartile in ratio["quartiles"]
        )
        undisturbed = abs(control["median"] - 1) <= CONTROL_BOUND and self.foreign_share <= FOREIGN_BOUND
        return {"valid": together and undisturbed, "foreign_share": round(self.foreign_share, 3)}


def warmed_up(run: Callable[[], Any], **info: Any) -> Prepared:
    """Runs the first units, of which the very first also compiles."""
    times = [seconds(run) for _ in range(4)]
    return Prepared(run, max(0.0, times[0] - times[-1]), times[-1], info)


def seconds(run: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(
    variants: Sequence[Variant], rows: Sequence[Any], *, control: str, rounds: int, progress: Callable[[str], None]
) -> Iterator[tuple[Any, Comparison]]:
    """Runs all variants side by side on each of `rows` (JSON values), the variant called `control` twice.

    Raises:
        RuntimeError: a variant failed; its own traceback is on stderr.
    """
    twin = dataclasses.replace(next(v for v in variants if v.name == control), name=CONTROL)
    with ExitStack() as stack:
        workers = {variant.name: stack.enter_context(_worker(variant)) for variant in (*variants, twin)}
        names = list(workers)
        for row in rows:
            info = {}
            for name in names:
                progress(f"{row}: preparing {name}")
                info[name] = _ask(workers[name], name, {"prepare": row})
            times: dict[str, list[float]] = {name: [] for name in names}
            foreign = _foreign_share([worker.pid for worker in workers.values()])
            for turn in range(rounds):
                progress(f"{row}: round {turn + 1} of {rounds}")
                for name in _order(names, turn):
                    answer = _ask(workers[name], name, "run")
                    times[name].append(answer["seconds"])
                    info[name]["peak_mib"] = answer["peak_mib"]
            yield row, Comparison(times, info, foreign())


def _foreign_share(workers: Sequence[int]) -> Callable[[], float]:
    """Returns a function: the share of all cores that other processes have taken since; 0 where Linux cannot tell."""

    def used() -> tuple[float, float]:
        total = [int(ticks) for ticks in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        own = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in workers]
        return sum(total[:3]) + sum(total[5:8]), sum(int(ticks) for pair in own for ticks in pair)

    if not Path("/proc/stat").exists():
        return lambda: 0.0
    before, start = used(), time.perf_counter()

    def share() -> float:
        busy, own = (after - first for first, after in zip(before, used()))
        ticks = (time.perf_counter() - start) * os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
        return max(0.0, busy - own) / ticks

    return share


def _order(names: list[str], turn: int) -> list[str]:
    """Every round starts with another variant, and every second round runs backwards, so that neighbours change too."""
    first = turn % len(names)
    rotated = names[first:] + names[:first]
    return rotated if turn % 2 == 0 else rotated[::-1]


def machine() -> dict[str, Any]:
    """Processor, cores, versions and date, to stand beside every number."""
    from importlib.metadata import version

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    packages = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d"),
        "allocator": " ".join(["freed memory kept", os.environ.get("GLIBC_TUNABLES", "")]).strip(),
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def has_gpu() -> bool:
    """Whether the variants will find a GPU; asked of PyTorch, in a process of its own."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    return "True" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def throughput(batch: int, seconds: float, info: dict[str, Any], flops: float | None = None) -> dict[str, Any]:
    """What a variant does per second, as JSON: images and, where the `flops` of a batch are known, TFLOP."""
    numbers = {"images_per_second": round(batch / seconds, 2)}
    if flops is not None:
        tflops = flops / seconds / 1e12
        numbers |= {"tflops": round(tflops, 3), "share_of_matmul_rate": round(tflops / info["matmul_tflops"], 2)}
    return numbers | info


def table(name: str, row: dict[str, Any]) -> str:
    """A row of a benchmark as text: its ratio, the proof of equal work, and a line for each variant."""
    void = "" if row["valid"] else " (VOID: the machine is not quiet)"
    same = ", ".join(f"{what} {value:g}" for what, value in row["same_work"].items())
    lines = [
        f"\n{name}: {row['ratio']['median']:.2f}× {row['baseline']}, quartiles {row['ratio']['quartiles']}, "
        f"control {row['control']['median']:.2f}, quartiles {row['control']['quartiles']}{void}",
        f"  same work, differences: {same}",
        f"  {'variant':38}{'img/s':>10}{'TFLOP/s':>10}{'of matmul':>11}{'compile s':>11}{'peak MiB':>10}",
    ]
    for variant, numbers in row["variants"].items():
        rate, share = numbers.get("tflops"), numbers.get("share_of_matmul_rate")
        products = "".rjust(21) if rate is None else f"{rate:10.3f}{share:11.0%}"
        peak = numbers.get("gpu_peak_mib", numbers["peak_mib"])
        lines.append(
            f"  {variant:38}{numbers['images_per_second']:10.1f}{products}{numbers['compile_seconds']:11.1f}{peak:10}"
        )
    return "\n".join(lines)


def finish(result: dict[str, Any], out: Path | None) -> None:
    """Adds the machine, writes the result to `out` if asked, and prints it as the last line."""
    result = result | {"machine": machine()}
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


@contextmanager
def _worker(variant: Variant) -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.work.paired", variant.prepare, json.dumps(variant.arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"TOKENIZERS_PARALLELISM": "false"} | os.environ,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _ask(process: subprocess.Popen, name: str, request: Any) -> dict[str, Any]:
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the variant {name!r} ended with exit code {process.wait()}")
    return json.loads(line)


def _serve(prepare: str, arguments: dict[str, Any]) -> None:
    """The child's side: prepares a row, then answers each request to run it with the seconds per unit."""
    keep_freed_memory()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be read as an answer
    module, function = prepare.split(":")
    function = getattr(importlib.import_module(module), function)
    for line in sys.stdin:
        request = json.loads(line)
        if request == "run":
            answer = _timed(prepared)
        else:
            prepared: Prepared = function(row=request["prepare"], **arguments)
            answer = prepared.info | {"compile_seconds": round(prepared.compile_seconds, 2)}
        print(json.dumps(answer), file=answers, flush=True)


def _timed(prepared: Prepared) -> dict[str, Any]:
    """Seconds per unit, over enough units that the clock's resolution does not matter."""
    units = max(1, round(STRETCH_SECONDS / prepared.unit_seconds))
    total = seconds(lambda: [prepared.run() for _ in range(units)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": total / units, "peak_mib": round(peak)}


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]))
