"""Depth heads on the same features, at the size of NYU's images: dinojax beside PyTorch, maps/s.

    python -m benchmarks.heads            10 rounds, on a CPU about 4 minutes
    python -m benchmarks.heads --quick    5 rounds

The features are random, of ViT-S/14 on an image of 480 × 640 px (35 × 46 patches); the backbone is not timed. The
linear head on four blocks is beside upstream's steps in PyTorch, DPT beside the neck and head of `transformers`. Both
sides hold the same weights; the largest difference of their depths is reported.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.work.paired import CONTROL, CONTROL_BOUND, Comparison, Prepared, Variant, compare, finish, warmed_up

THEIRS, OURS = "torch", "dinojax"
BACKBONE, ROWS, COLUMNS, DIM, BLOCKS = "dinov2_vits14", 35, 46, 384, 4
HEADS = ("nyu-linear4", "nyu-dpt")


@dataclasses.dataclass(frozen=True)
class Config:
    """Depth heads, dinojax beside PyTorch; ends in one line of JSON."""

    quick: bool = False
    """Run 5 rounds."""
    rounds: int = 10
    """Number of rounds of the full run."""
    out: Path | None = None
    """File that the JSON is also written to."""


def main() -> None:
    """Parses the command line, runs both heads, prints a table and a line of JSON."""
    import tyro

    config = tyro.cli(Config, prog="python -m benchmarks.heads", description=__doc__)
    rounds, rows = 5 if config.quick else config.rounds, {}
    with tempfile.TemporaryDirectory() as folder:
        variants = [
            Variant(THEIRS, "benchmarks.heads:prepare_torch", {"folder": folder}),  # writes the weights
            Variant(OURS, "benchmarks.heads:prepare_jax", {"folder": folder}),
        ]
        for head, found in compare(variants, HEADS, control=THEIRS, rounds=rounds, progress=_progress):
            rows[head] = _row(found)
            row = rows[head]
            print(
                f"{head}: {row['ratio']['median']:.2f}× torch, quartiles {row['ratio']['quartiles']}, control "
                f"{row['control']['median']:.2f}, largest difference {row['largest_difference_m']:.1e} m, "
                + ", ".join(
                    f"{name} {numbers['maps_per_second']:.2f} maps/s" for name, numbers in row["variants"].items()
                )
                + ("" if row["valid"] else " (VOID: the machine is too noisy)"),
                flush=True,
            )
    ratios = {name: row["ratio"]["median"] for name, row in rows.items()}
    finish({"benchmark": "heads", "ratios": ratios, "rounds": rounds, "rows": rows}, config.out)


def _progress(text: str) -> None:
    print(text, file=sys.stderr)


def _row(found: Comparison) -> dict[str, Any]:
    depths = {name: info.pop("depth") for name, info in found.info.items()}
    control = found.ratio(CONTROL, THEIRS)
    return {
        "ratio": found.ratio(OURS, THEIRS),
        "control": control,
        "valid": abs(control["median"] - 1) <= CONTROL_BOUND,
        "largest_difference_m": max(abs(a - b) for a, b in zip(depths[OURS], depths[THEIRS])),
        "variants": {
            name: {"maps_per_second": round(1 / found.median(name), 3)} | info for name, info in found.info.items()
        },
    }


def _features() -> tuple[Any, Any]:
    """Patch tokens "blocks rows columns dim" and class tokens "blocks dim" of one image."""
    import numpy as np

    random = np.random.default_rng(0)
    patches = random.standard_normal((BLOCKS, 1, ROWS, COLUMNS, DIM), np.float32)
    return patches, random.standard_normal((BLOCKS, 1, DIM), np.float32)


def prepare_torch(row: str, folder: str) -> Prepared:
    """PyTorch's side, in eager mode; it writes the weights under upstream's names."""
    import os

    import torch
    from torch.nn import functional

    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    patches, cls_tokens = (torch.from_numpy(array) for array in _features())
    if row == "nyu-dpt":
        neck, head, state = _torch_dpt()
        tokens = [torch.cat([cls[:, None], x.flatten(1, 2)], dim=1) for x, cls in zip(patches, cls_tokens)]

        def depth():
            return head(neck(tokens, ROWS, COLUMNS)) + 0.001
    else:
        conv = torch.nn.Conv2d(2 * DIM * BLOCKS, 256, 1)
        state = {f"conv_depth.{name}": tensor for name, tensor in conv.state_dict().items()}
        bins = torch.linspace(0.001, 10, 256)
        maps = [x.permute(0, 3, 1, 2).contiguous() for x in patches]

        def depth():
            joined = [torch.cat([x, cls[:, :, None, None].expand_as(x)], 1) for x, cls in zip(maps, cls_tokens)]
            size = [4 * ROWS, 4 * COLUMNS]
            resized = [functional.interpolate(x, size, mode="bilinear", align_corners=False) for x in joined]
            weights = torch.relu(conv(torch.cat(resized, dim=1))) + 0.1
            return torch.einsum("nbhw,b->nhw", weights / weights.sum(dim=1, keepdim=True), bins)

    if not (Path(folder) / f"{row}.pth").exists():
        torch.save(state, Path(folder) / f"{row}.pth")

    @torch.inference_mode()
    def run():
        return depth()

    prepared = warmed_up(run)
    prepared.info["depth"] = run().flatten()[::997].tolist()
    return prepared


def _torch_dpt() -> tuple[Any, Any, dict[str, Any]]:
    """Neck and head of DPTForDepthEstimation with random weights, and these under upstream's names."""
    import torch
    import transformers

    from converters.huggingface.names import dpt_from_hugging_face

    backbone = transformers.Dinov2Config(
        hidden_size=DIM, num_hidden_layers=BLOCKS, num_attention_heads=6, out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )  # fmt: skip
    config = transformers.DPTConfig(
        backbone_config=backbone, neck_hidden_sizes=[DIM // 8, DIM // 4, DIM // 2, DIM],
        use_bias_in_fusion_residual=False, add_projection=True,
    )  # fmt: skip
    model = transformers.DPTForDepthEstimation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    state = {name: x for name, x in model.state_dict().items() if not name.startswith("backbone.")}
    return model.neck, model.head, dpt_from_hugging_face(state)


def prepare_jax(row: str, folder: str) -> Prepared:
    """Our side: the imported head under plain `jax.jit`, its parameters as arguments."""
    import jax
    import numpy as np
    from flax import nnx

    from converters.heads import head_config, read_head

    graphdef, state = nnx.split(read_head(Path(folder) / f"{row}.pth", head_config(BACKBONE, row)))
    layers = jax.device_put([tuple(pair) for pair in zip(*_features())])
    forward = jax.jit(lambda state, layers: nnx.merge(graphdef, state)(layers))
    prepared = warmed_up(lambda: jax.block_until_ready(forward(state, layers)))
    prepared.info["depth"] = np.asarray(forward(state, layers)).ravel()[::997].tolist()
    return prepared


if __name__ == "__main__":
    main()
