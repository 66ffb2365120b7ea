"""Work, memory and communication of a pretraining step on meshes of simulated devices, from the compiled program.

    python -m benchmarks.meshes --quick        a tiny model, half a minute
    python -m benchmarks.meshes                ViT-Ti/16, 65,536 prototypes, eight devices, minutes

Nothing is computed: the step of `dinojax pretrain` is compiled for each mesh, and XLA tells what a device has to do.
"share" is the work of a device, in parts of an equal division of the step as it is written; "state" is the memory of
parameters and optimiser; "temporary" that of everything else during the step, as the CPU compiler lays it out. The rest
is what a device gets from others in a step, by kind of exchange.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from benchmarks.work.compiled import collectives, exchanged_bytes

DEVICES = 8
MESHES = ("data=8", "data=4,fsdp=2", "fsdp=8")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_TINY: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 4, "prototypes": 1024,
                         "head_hidden_dim": 128, "bottleneck_dim": 64, "batch_size": 16}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """What devices do in a pretraining step; ends in one line of JSON."""

    quick: bool = False
    """Take a tiny model and small crops."""
    method: str = "dino"
    """Method of the step: dino or dinov2."""
    embed_dim: int = 192
    """Width of the vision transformer."""
    depth: int = 12
    """Number of transformer blocks."""
    num_heads: int = 3
    """Number of attention heads."""
    prototypes: int = 65_536
    """Number of prototypes."""
    batch_size: int = 64
    """Images per step, over all devices."""
    meshes: tuple[str, ...] = MESHES
    """Meshes of two to eight devices; one device computes in chunks, which the compiler counts once."""
    out: Path | None = None
    """File that the JSON is also written to."""


def main() -> None:
    """Parses the command line, compiles the step for each mesh, prints a table and a line of JSON."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import tyro

    from benchmarks.work.paired import finish
    from dinojax.commands import exit_on_user_error

    config = tyro.cli(Config, prog="python -m benchmarks.meshes", description=__doc__)
    with exit_on_user_error():
        rows = {}
        for mesh in config.meshes:
            rows[mesh] = _measure(mesh, config)
            print(_line(mesh, rows[mesh]), flush=True)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("out", "meshes")}
    finish({"benchmark": "meshes", "settings": settings, "rows": rows}, config.out)


def _measure(mesh: str, config: Config) -> dict[str, float]:
    import jax
    import numpy as np

    from dinojax.parallel import replicated
    from dinojax.pretraining.step import Batches
    from experiments.pretraining.program import make_program

    program = make_program(_settings(mesh, config), steps_per_epoch=100)
    side = 256 if not config.quick else 36
    place = None if program.mesh.size == 1 else replicated(program.mesh)
    images = jax.ShapeDtypeStruct((256, side, side, 3), np.uint8, sharding=place)
    rows = np.zeros((1, _settings(mesh, config).training.batch_size), np.int32)
    lowered = program.steps.lower(program.abstract, images, Batches(rows, rows, np.zeros(1, np.int32)), 1)
    compiled = lowered.compile()
    work, whole = (stage.cost_analysis()["flops"] / 1e9 for stage in (compiled, lowered))
    memory, exchanged = compiled.memory_analysis(), exchanged_bytes(collectives(compiled.as_text()))
    held = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(program.abstract)
    )
    return {
        "devices": program.mesh.size,
        "gflop": work,
        "share": work * program.mesh.size / whole,
        "state_mib": held / 2**20,
        "temporary_mib": memory.temp_size_in_bytes / 2**20,
        **{f"{kind}_mib": exchanged.get(kind, 0) / 2**20 for kind in KINDS},
    }


def _settings(mesh: str, config: Config) -> Any:
    from dinojax.pretraining import MultiCropConfig
    from experiments.pretraining.config import PretrainConfig
    from experiments.runs.settings import create, replace

    shape = {name: getattr(config, name) for name in ("embed_dim", "depth", "num_heads", "prototypes", "batch_size")}
    settings = create(PretrainConfig, data="none", method=config.method, mesh=mesh, drop_path_rate=0.0, **shape)
    if not config.quick:
        return settings
    return replace(settings, crops=MultiCropConfig(global_size=32, local_size=16, local_crops=4), **_TINY)


def _line(mesh: str, row: dict[str, float]) -> str:
    moved = ", ".join(f"{kind} {row[f'{kind}_mib']:,.1f}" for kind in KINDS if row[f"{kind}_mib"] >= 0.05)
    return (
        f"{mesh:14} {row['gflop']:,.2f} GFLOP a device (share {row['share']:.3f}), state {row['state_mib']:,.1f} MiB, "
        f"temporary {row['temporary_mib']:,.1f} MiB, gets in MiB: {moved or 'nothing'}"
    )


if __name__ == "__main__":
    main()
