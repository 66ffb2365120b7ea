"""Compares PyTorch and Flax on the same images: the largest difference of each output."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.pytorch_models import Outputs, block_name, hub_reference, transformers_reference
from dinojax.models.config import ViTConfig
from dinojax.models.vit import VisionTransformer

BOUND = 3e-5
"""Largest accepted difference, as a share of the largest value of the output; float32 rounding stays well below it."""


class Difference(NamedTuple):
    """The largest absolute difference of one output at one image size (height, width), and its largest value."""

    reference: str
    output: str
    size: tuple[int, int]
    largest: float
    scale: float


def verify(
    model: VisionTransformer,
    checkpoint: Mapping[str, Any],
    *,
    which: str = "teacher",
    sizes: Sequence[tuple[int, int]] | None = None,
) -> tuple[list[Difference], list[str]]:
    """Compares a converted model with PyTorch models that hold the tensors of its checkpoint.

    Args:
        model: the result of `from_torch` for `checkpoint`.
        checkpoint: tensors from `read_state_dict`.
        which: the network in a training checkpoint.
        sizes: heights and widths of images in pixels; None takes `default_sizes`.

    Returns:
        A difference for each PyTorch model, output and size; and one sentence for each comparison that was left out.

    Raises:
        UserError: torch or transformers is missing, or transformers has no such architecture.
    """
    references, notes = [transformers_reference(model.config, checkpoint, which)], []
    hub = hub_reference(model.config, checkpoint, which)
    if isinstance(hub, str):
        notes.append(f"upstream's own code was left out: {hub}")
    else:
        references.append(hub)
    differences = []
    for reference in references:
        ours = _with_config(model, reference.config)
        for size in sizes or default_sizes(model.config):
            images = np.random.default_rng(0).standard_normal((2, 3, *size), dtype=np.float32)
            theirs, flax = reference.outputs(images), _flax_outputs(ours, images.transpose(0, 2, 3, 1))
            differences += [
                Difference(reference.title, name, size, _largest(flax[name] - theirs[name]), _largest(theirs[name]))
                for name in theirs
            ]
    return differences, notes


def default_sizes(config: ViTConfig) -> list[tuple[int, int]]:
    """Heights and widths that the patch size divides: small, non-square, about 224 px, native."""
    patch = config.patch_size
    about_224 = max(1, 224 // patch) * patch
    sizes = [(7 * patch, 7 * patch), (10 * patch, 13 * patch), (about_224, about_224), (config.img_size,) * 2]
    return list(dict.fromkeys(sizes))


def worst(differences: Sequence[Difference]) -> float:
    """The largest difference as a share of the largest value of its output; NaN counts as infinite."""
    shares = [difference.largest / max(difference.scale, 1e-30) for difference in differences]
    return max(share if np.isfinite(share) else np.inf for share in shares)


def table(differences: Sequence[Difference]) -> str:
    """A table for each PyTorch model: outputs down, sizes across."""
    lines = []
    for title in dict.fromkeys(difference.reference for difference in differences):
        rows = [difference for difference in differences if difference.reference == title]
        sizes = list(dict.fromkeys(row.size for row in rows))
        heads = "".join(f"{f'{height}x{width}':>12}" for height, width in sizes)
        lines += [f"{title}: largest absolute difference", f"{'output':<18}{heads}{'largest value':>16}"]
        for output in dict.fromkeys(row.output for row in rows):
            cells = {row.size: row for row in rows if row.output == output}
            numbers = "".join(f"{cells[s].largest:>12.1e}" if s in cells else f"{'-':>12}" for s in sizes)
            lines.append(f"{output:<18}{numbers}{max(cell.scale for cell in cells.values()):>16.3g}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array).max())


def _with_config(model: VisionTransformer, config: ViTConfig) -> VisionTransformer:
    model = nnx.clone(model)
    model.config = config
    return model


def _flax_outputs(model: VisionTransformer, images: np.ndarray) -> Outputs:
    graphdef, state = nnx.split(model)

    @jax.jit
    def outputs(state, images):
        model = nnx.merge(graphdef, state)
        features, depth = model(images), len(model.blocks)
        blocks = model.get_intermediate_layers(images, n=depth, return_class_token=True, norm=False)
        named = {"cls_token": features.cls_token, "patch_tokens": features.patch_tokens}
        named |= {"register_tokens": features.register_tokens, "attention": model.get_last_selfattention(images)}
        return named | {
            block_name(i): jnp.concatenate([cls_token[:, None], patches], 1)
            for i, (patches, cls_token) in enumerate(blocks)
        }

    with jax.default_matmul_precision("highest"):
        return {name: np.asarray(array) for name, array in outputs(state, jnp.asarray(images)).items()}
