"""Feature extraction, ViT-S/14 at 224 px: dinojax beside PyTorch (`transformers` Dinov2 with SDPA), img/s.

    python -m benchmarks.features            the README's table (10 rounds; on CPU about 10 minutes)
    python -m benchmarks.features --quick    5 rounds against eager PyTorch, under 3 minutes on 2 cores

Both sides hold the same weights and see the same random images; the largest difference of their class tokens is
reported. On CPU both compute in float32 with as many threads as there are cores, on a GPU in bfloat16.
"""

import dataclasses
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
    has_gpu,
    throughput,
    warmed_up,
)
from benchmarks.work.torch_cpu import use_all_cores

MODEL = "dinov2_vits14"
EAGER, OURS = "torch eager", "dinojax"
GFLOP_PER_IMAGE = 12.25  # multiply-adds counted twice, 257 tokens
SIZE = 224


@dataclasses.dataclass(frozen=True)
class Config:
    """Feature extraction of ViT-S/14 at 224 px, dinojax beside PyTorch; ends in one line of JSON."""

    quick: bool = False
    """Run 5 rounds against eager PyTorch only."""
    batches: tuple[int, ...] = ()
    """Batch sizes. Empty takes 1, 8 and 32 on a CPU, and 32, 256 and 1024 on a GPU."""
    rounds: int = 10
    """Number of rounds of the full run."""
    out: Path | None = None
    """File that the JSON is also written to."""


def main() -> None:
    """Parses the command line, runs every batch size, prints a table and a line of JSON."""
    import tyro

    config = tyro.cli(Config, prog="python -m benchmarks.features", description=__doc__)
    gpu = has_gpu()
    rounds = 5 if config.quick else config.rounds
    batches = config.batches or ((32, 256, 1024) if gpu else (1, 8, 32))
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        variants = _variants(Path(folder) / "weights.safetensors", gpu=gpu, eager_only=config.quick)
        found = compare(variants, batches, control=EAGER, rounds=rounds, progress=_progress)
        for batch, comparison in found:
            rows[f"batch {batch}"] = _row(batch, comparison)
            print(_table(batch, rows[f"batch {batch}"]), flush=True)
    result = {
        "benchmark": "features",
        "ratios": {name: row["ratio"]["median"] for name, row in rows.items()},
        "model": MODEL,
        "image_size": SIZE,
        "device": "gpu, bfloat16" if gpu else "cpu, float32",
        "rounds": rounds,
        "rows": rows,
    }
    finish(result, config.out)


def _progress(text: str) -> None:
    print(f"batch {text}", file=sys.stderr)


def _variants(weights: Path, *, gpu: bool, eager_only: bool) -> list[Variant]:
    modes = () if eager_only else ("default", "max-autotune") if gpu else ("default",)
    shared = {"weights": str(weights)}
    torch = "benchmarks.features:prepare_torch"
    return [
        Variant(EAGER, torch, shared | {"mode": "eager"}),  # the first to run writes the weights
        *[Variant(f"torch compile {mode}", torch, shared | {"mode": mode}) for mode in modes],
        Variant(OURS, "benchmarks.features:prepare_jax", shared),
    ]


def _row(batch: int, found: Comparison) -> dict[str, Any]:
    """The numbers of one batch size; the ratio is to the fastest PyTorch."""
    baseline = min((name for name in found.seconds if name.startswith("torch")), key=found.median)
    control = found.ratio(CONTROL, EAGER)
    tokens = {name: info.pop("cls_token") for name, info in found.info.items()}
    flops = batch * GFLOP_PER_IMAGE * 1e9
    return {
        "ratio": found.ratio(OURS, baseline),
        "baseline": baseline,
        "ratio_to_eager": found.ratio(OURS, EAGER),
        "control": control,
        **found.verdict(control, found.ratio(OURS, baseline)),
        "largest_cls_difference": max(abs(a - b) for a, b in zip(tokens[OURS], tokens[EAGER])),
        "variants": {n: throughput(batch, found.median(n), info, flops) for n, info in found.info.items()},
    }


def _table(batch: int, row: dict[str, Any]) -> str:
    void = "" if row["valid"] else " (VOID: the machine is not quiet)"
    lines = [
        f"\nbatch {batch}: {row['ratio']['median']:.2f}× {row['baseline']}, quartiles {row['ratio']['quartiles']}, "
        f"control {row['control']['median']:.2f}{void}, largest difference {row['largest_cls_difference']:.1e}",
        f"  {'variant':24}{'img/s':>10}{'TFLOP/s':>10}{'of matmul':>11}{'compile s':>11}{'peak MiB':>10}",
    ]
    for name, numbers in row["variants"].items():
        lines.append(
            f"  {name:24}{numbers['images_per_second']:10.1f}{numbers['tflops']:10.2f}"
            f"{numbers['share_of_matmul_rate']:11.0%}{numbers['compile_seconds']:11.1f}{numbers['peak_mib']:10}"
        )
    return "\n".join(lines)


def _images(batch: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).standard_normal((batch, SIZE, SIZE, 3), np.float32)


def prepare_torch(row: int, weights: str, mode: str) -> Prepared:
    """PyTorch's side: `transformers` Dinov2Model under `inference_mode`, compiled unless `mode` is "eager"."""

    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    use_all_cores()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    settings = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**settings, attn_implementation="sdpa")).eval()
    if not Path(weights).exists():
        with torch.no_grad():
            state = {name: value + 0.02 * torch.randn_like(value) for name, value in model.state_dict().items()}
        save_file(state, weights)
    model.load_state_dict(load_file(weights))
    model.to(device, dtype)
    forward = model if mode == "eager" else torch.compile(model, mode=None if mode == "default" else mode)
    pixels = torch.from_numpy(_images(row).transpose(0, 3, 1, 2).copy()).to(device, dtype)
    left, right = (torch.randn(shape, device=device, dtype=dtype) for shape in _matmul_shapes(row))

    @torch.inference_mode()
    def run(work):
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    def features():
        return run(lambda: forward(pixels).last_hidden_state)

    rate = _matmul_tflops(row, lambda: run(lambda: left @ right))
    prepared = warmed_up(features, matmul_tflops=rate)
    prepared.info["cls_token"] = features()[0, 0].float().tolist()
    return prepared


def prepare_jax(row: int, weights: str) -> Prepared:
    """Our side: the converted model under plain `jax.jit`, its parameters as arguments."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from safetensors.numpy import load_file

    from converters import from_torch
    from dinojax import VARIANTS
    from dinojax.models.chunks import in_chunks

    # `transformers` resizes the position table without upstream's offset; identical work includes that.
    config = dataclasses.replace(VARIANTS[MODEL], interpolate_offset=0.0)
    graphdef, state = nnx.split(from_torch(load_file(weights), config=config))
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    state = jax.tree.map(lambda x: x.astype(dtype), state)
    forward = jax.jit(lambda state, images: in_chunks(nnx.merge(graphdef, state), config, images))
    images = jax.device_put(_images(row).astype(dtype))
    left, right = (jax.random.normal(jax.random.key(0), shape, dtype) for shape in _matmul_shapes(row))
    product = jax.jit(jnp.matmul)
    rate = _matmul_tflops(row, lambda: product(left, right).block_until_ready())
    prepared = warmed_up(lambda: jax.block_until_ready(forward(state, images)), matmul_tflops=rate)
    prepared.info["cls_token"] = forward(state, images).cls_token[0].astype(jnp.float32).tolist()
    return prepared


def _matmul_shapes(batch: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The model's largest product, of eight images at least."""
    return (257 * max(batch, 8), 384), (384, 1536)


def _matmul_tflops(batch: int, product) -> float:
    """The rate of that product alone: the ceiling of what this library's model can reach here."""
    (tokens, dim), (_, hidden) = _matmul_shapes(batch)
    fastest = min(warmed_up(product).unit_seconds for _ in range(5))
    return round(2 * tokens * dim * hidden / fastest / 1e12, 3)


if __name__ == "__main__":
    main()
