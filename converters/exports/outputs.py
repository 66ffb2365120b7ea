"""What an exported model returns, and the JSON beside it that says what it takes."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from dinojax.documents import write_whole
from dinojax.errors import UserError
from dinojax.maps import cls_attention
from dinojax.models.vit import VisionTransformer

OUTPUTS = ("cls", "patches", "attention")
_LARGEST = 1_900_000_000  # bytes; a protobuf or flatbuffer holds less than 2 GiB


def parse_outputs(text: str) -> tuple[str, ...]:
    """ "cls,patches" → ("cls", "patches").

    Raises:
        UserError: an unknown name, one twice, or none.
    """
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in OUTPUTS]
    if unknown or len(set(names)) < len(names):
        raise UserError(f"--outputs {text} is not a list of different names among {', '.join(OUTPUTS)}")
    return names


def shapes(model: VisionTransformer, size: int, outputs: Sequence[str]) -> dict[str, list[str | int]]:
    """Output → its axes, "batch" first."""
    config = model.config
    side = size // config.patch_size
    every: dict[str, list[str | int]] = {
        "cls": ["batch", config.embed_dim],
        "patches": ["batch", side * side, config.embed_dim],
        "attention": ["batch", config.num_heads, side, side],
    }
    return {name: every[name] for name in outputs}


def forward(model: VisionTransformer, outputs: Sequence[str]) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Normalised images "batch size size channels" → the outputs by name; the parameters are constants in it."""
    graphdef, state = nnx.split(model)

    def run(images: jax.Array) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, state)
        found: dict[str, Any] = {}
        if {"cls", "patches"} & set(outputs):
            features = model(images)
            found |= {"cls": features.cls_token, "patches": features.patch_tokens}
        if "attention" in outputs:
            rows, columns = (side // model.config.patch_size for side in images.shape[1:3])
            # XLA merges the blocks that both computations share.
            registers = model.config.num_register_tokens
            probabilities = model.get_last_selfattention(images)
            found["attention"] = cls_attention(probabilities, rows, columns, num_register_tokens=registers)
        return {name: found[name] for name in outputs}

    return run


def raise_unless_exportable(model: VisionTransformer, size: int) -> None:
    """Refuses a size that the model does not take, and a model too large for one file."""
    config = model.config
    fits = size % config.patch_size == 0 if config.family == "dinov2" else True
    if size < config.patch_size or not fits:
        near = max(1, round(size / config.patch_size)) * config.patch_size
        raise UserError(f"--size {size} is not a size of images for patches of {config.patch_size} px; {near} is")
    size_in_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    if size_in_bytes > _LARGEST:
        raise UserError(
            f"the model has {size_in_bytes / 1e9:.1f} GB of parameters, and one exported file holds less than 2 GB; "
            "--to torch or --to huggingface writes it"
        )


def write_description(model: VisionTransformer, file: Path, size: int, outputs: Sequence[str], **more: Any) -> None:
    """Writes FILE.json: the preprocessing of the images, their size and layout, and the outputs."""
    preprocessing = dataclasses.asdict(model.preprocessing) | {"image_size": size}
    document: dict[str, Any] = {**more, "preprocessing": preprocessing, "outputs": shapes(model, size, outputs)}
    write_whole(description_of(file), (json.dumps(document, indent=2) + "\n").encode())


def description_of(file: Path) -> Path:
    """The path of the JSON beside an exported program."""
    return file.with_name(f"{file.name}.json")


def described_preprocessing(file: Path) -> dict[str, Any]:
    """Mean, deviation, size and interpolation from the JSON beside an exported program; {} without one.

    Raises:
        UserError: the JSON is damaged.
    """
    beside = description_of(file)
    if not beside.is_file():
        return {}
    try:
        document = json.loads(beside.read_bytes())
        return {name: document["preprocessing"][name] for name in ("mean", "std", "image_size", "interpolation")}
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{beside} is damaged ({error!s:.80}); export the model again, or remove it") from error
