"""Exported programs beside the model itself, ViT-S/14 at 224 px with random weights, img/s.

    python -m benchmarks.exported            10 rounds, two minutes on two CPU cores
    python -m benchmarks.exported --quick    5 rounds, one minute

The model under `jax.jit`, its StableHLO file under `jax.export`, and its ONNX file under onnxruntime see the same
images in float32; the largest differences of class tokens are reported. Needs the extra `onnx`.
"""

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.work.paired import (
    CONTROL,
    Comparison,
    Prepared,
    Variant,
    compare,
    finish,
    table,
    throughput,
    warmed_up,
)

OURS, STABLEHLO, ONNX = "dinojax", "stablehlo", "onnxruntime"
MODEL, SIZE = "dinov2_vits14", 224


@dataclasses.dataclass(frozen=True)
class Config:
    """Exported programs beside the model; ends in one line of JSON."""

    batches: tuple[int, ...] = (1, 8)
    """Batch sizes to run."""
    rounds: int = 10
    """Number of rounds."""
    quick: bool = False
    """Whether to run 5 rounds only."""
    out: Path | None = None
    """File that the JSON is also written to."""


def main() -> None:
    """Parses the command line, exports the model, runs every batch size, prints a table and a line of JSON."""
    import tyro

    config = tyro.cli(Config, prog="python -m benchmarks.exported", description=__doc__)
    rows, rounds = {}, 5 if config.quick else config.rounds
    with tempfile.TemporaryDirectory() as folder:
        variants = [Variant(name, f"benchmarks.exported:prepare_{name}", {"folder": folder}) for name in
                    (OURS, STABLEHLO, ONNX)]  # fmt: skip
        _export(Path(folder))
        for batch, found in compare(variants, config.batches, control=OURS, rounds=rounds, progress=_progress):
            rows[f"batch {batch}"] = _row(batch, found)
            print(table(f"batch {batch}", rows[f"batch {batch}"]), flush=True)
    ratios = {name: row["ratio"]["median"] for name, row in rows.items()}
    finish({"benchmark": "exported", "ratios": ratios, "model": MODEL, "image_size": SIZE, "rows": rows}, config.out)


def _progress(text: str) -> None:
    print(text, file=sys.stderr)


def _export(folder: Path) -> None:
    """Random weights, and the two programs, in files of `folder`."""
    from flax import nnx

    from converters.__main__ import main as convert
    from dinojax import VARIANTS, VisionTransformer, save

    save(VisionTransformer(VARIANTS[MODEL], rngs=nnx.Rngs(0)), folder / "model")
    for target in ("stablehlo", "onnx"):
        convert([str(folder / "model"), "--to", target, "--out", str(folder / f"model.{target}")])


def _row(batch: int, found: Comparison) -> dict[str, Any]:
    """The numbers of one batch size; the ratio is to onnxruntime."""
    control = found.ratio(CONTROL, OURS)
    tokens = {name: info.pop("cls") for name, info in found.info.items()}
    return {
        "ratio": found.ratio(OURS, ONNX),
        "ratio_to_stablehlo": found.ratio(OURS, STABLEHLO),
        "baseline": ONNX,
        "control": control,
        **found.verdict(control, found.ratio(OURS, ONNX)),
        "same_work": {
            f"class tokens of {name}": max(abs(a - b) for a, b in zip(tokens[OURS], tokens[name]))
            for name in (STABLEHLO, ONNX)
        },
        "variants": {name: throughput(batch, found.median(name), info) for name, info in found.info.items()},
    }


def _images(batch: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).standard_normal((batch, SIZE, SIZE, 3), np.float32)


def prepare_dinojax(row: int, folder: str) -> Prepared:
    """The model under `jax.jit`, its parameters as arguments."""
    import jax

    from dinojax import load

    model, images = load(Path(folder, "model")), _images(row)
    forward = jax.jit(lambda model, images: model(images)[:2])
    prepared = warmed_up(lambda: jax.block_until_ready(forward(model, images)))
    prepared.info["cls"] = forward(model, images)[0][0].tolist()
    return prepared


def prepare_stablehlo(row: int, folder: str) -> Prepared:
    """The StableHLO file under `jax.export`, as its conversion prints it."""
    import jax
    import jax.export

    run = jax.jit(jax.export.deserialize(bytearray(Path(folder, "model.stablehlo").read_bytes())).call)
    images = _images(row)
    prepared = warmed_up(lambda: jax.block_until_ready(run(images)))
    prepared.info["cls"] = run(images)["cls"][0].tolist()
    return prepared


def prepare_onnxruntime(row: int, folder: str) -> Prepared:
    """The ONNX file on CPU, with a thread for each core that the process may use."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    file = str(Path(folder, "model.onnx"))
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    images = {"pixel_values": np.ascontiguousarray(_images(row).transpose(0, 3, 1, 2))}
    prepared = warmed_up(lambda: session.run(None, images))
    prepared.info["cls"] = session.run(["cls"], images)[0][0].tolist()
    return prepared


if __name__ == "__main__":
    main()
