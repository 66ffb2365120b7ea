"""PyTorch models to compare a conversion with, filled with the tensors of its checkpoint.

They come from `transformers` (Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, and ViTModel for DINO), and for
DINO and DINOv2 from upstream's code through `torch.hub` if GitHub can be reached. `transformers` resizes the position
table to the exact size, upstream by a factor that is 0.1 patch larger. At other sizes than the native one, the Flax
model must follow the same convention.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from converters.download import reachable
from converters.huggingface.folder import model_settings
from converters.huggingface.names import to_hugging_face
from converters.huggingface.positions import with_positions
from converters.layouts import part_of_checkpoint
from converters.weight_files.optional import import_torch
from dinojax.errors import UserError
from dinojax.models.config import ViTConfig
from dinojax.models.variants import VARIANTS

_BLOCKS_SHOWN = 4
_MOST_TOKENS_FOR_ATTENTION = 600  # PyTorch returns the attention of every block: gigabytes for many tokens
_HUB: dict[str | None, str] = {
    "dino": "facebookresearch/dino:7c446df5b9f45747937fb0d72314eb9f7b66930a",
    "dinov2": "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0",
}

_NOT_COMPARED = re.compile(r"^(\w+\.)?(classifier|pooler)\.")
Outputs = dict[str, np.ndarray]


class Reference(NamedTuple):
    """A PyTorch model: title, Flax configuration of equal conventions, and images "batch 3 height width" → outputs."""

    title: str
    config: ViTConfig
    outputs: Callable[[np.ndarray], Outputs]


def block_name(index: int) -> str:
    """The name of the output of a block before the final norm: class token, then patches, without registers."""
    return f"block {index} (raw)"


def transformers_reference(config: ViTConfig, checkpoint: Mapping[str, Any], which: str) -> Reference:
    """The model of `transformers` with the tensors of `checkpoint`.

    Raises:
        UserError: torch or transformers is missing, or transformers has no such architecture.
    """
    torch, transformers = import_torch(), _import_transformers()
    state = _hugging_face_state(config, checkpoint, which)
    kind, torch_config, extra, call = _hugging_face_model(transformers, config)
    transformers.utils.logging.disable_progress_bar()
    network, info = kind.from_pretrained(
        None, config=torch_config, state_dict=state, dtype=torch.float32, output_loading_info=True, **extra
    )
    unfilled = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if unfilled:
        raise UserError(f"transformers' {kind.__name__} does not hold these weights: {unfilled}")
    network.eval()
    first_patch = 1 + config.num_register_tokens

    def outputs(images: np.ndarray) -> Outputs:
        tokens = first_patch + (images.shape[2] // config.patch_size) * (images.shape[3] // config.patch_size)
        with_attention = tokens <= _MOST_TOKENS_FOR_ATTENTION
        with torch.inference_mode():
            result = network(
                torch.from_numpy(images), output_hidden_states=True, output_attentions=with_attention, **call
            )
        last = result.last_hidden_state.numpy()
        named = {"cls_token": last[:, 0], "patch_tokens": last[:, first_patch:]}
        if config.num_register_tokens:
            named["register_tokens"] = last[:, 1:first_patch]
        for index in range(max(0, config.depth - _BLOCKS_SHOWN), config.depth):
            hidden = result.hidden_states[index + 1].numpy()
            named[block_name(index)] = np.concatenate([hidden[:, :1], hidden[:, first_patch:]], 1)
        return named | ({"attention": result.attentions[-1].numpy()} if with_attention else {})

    title = f"transformers {transformers.__version__} {kind.__name__}"
    if config.family == "dinov3":
        title += ", both sides with periods in float32" if config.rope_periods != "float32" else ""
        return Reference(title, with_positions(config, "huggingface"), outputs)
    if config.interpolate_offset:
        title += ", both sides without upstream's +0.1 in resizing positions"
    return Reference(title, dataclasses.replace(config, interpolate_offset=0.0), outputs)


def _hugging_face_model(transformers: Any, config: ViTConfig) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """Class, configuration, arguments of the constructor, arguments of the call."""
    settings = model_settings(config)
    kind = getattr(transformers, settings["architectures"][0])
    eager = {"attn_implementation": "eager"}  # the others return no attention
    torch_config = transformers.AutoConfig.for_model(**settings, **eager)
    if config.family == "dino":
        return kind, torch_config, {"add_pooling_layer": False}, {"interpolate_pos_encoding": True}
    return kind, torch_config, {}, {}


def _hugging_face_state(config: ViTConfig, checkpoint: Mapping[str, Any], which: str) -> dict[str, Any]:
    """Tensors under Hugging Face's names; a file that already has them is used as it is, without a head."""
    if any("embeddings." in str(name) for name in checkpoint):
        return {name: _tensor(value) for name, value in checkpoint.items() if not _NOT_COMPARED.search(name)}
    state = part_of_checkpoint(checkpoint, part="backbone", which=which)
    return {name: _tensor(array) for name, array in to_hugging_face(state, config.family).items()}


def _tensor(value: Any) -> Any:
    torch = import_torch()
    return value.float() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value, np.float32))


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("--verify needs transformers: pip install 'dinojax[torch]'") from error
    return transformers


def hub_reference(config: ViTConfig, checkpoint: Mapping[str, Any], which: str) -> Reference | str:
    """Upstream's model with these tensors, or the reason why it is left out."""
    torch = import_torch()
    if config.family == "dinov3":
        return "the code of DINOv3 has a licence of its own, and is not downloaded"
    config = with_positions(config, "hub")
    name = next((name for name, variant in VARIANTS.items() if variant == config), None)
    if name is None or "vitt" in name:
        return "torch.hub has no model of this architecture"
    if config.family == "dino" and importlib.util.find_spec("torchvision") is None:
        return "torch.hub's DINO needs torchvision"
    if not reachable("https://github.com"):
        return "github.com cannot be reached"
    try:
        network = torch.hub.load(
            _HUB[config.family], name, pretrained=False, trust_repo=True, skip_validation=True, verbose=False
        )
    except (OSError, RuntimeError) as error:
        return f"torch.hub failed ({error})"
    state = part_of_checkpoint(checkpoint, part="backbone", which=which)
    network.load_state_dict({key: _tensor(array) for key, array in state.items()}, strict=True)
    network.eval()

    def outputs(images: np.ndarray) -> Outputs:
        with torch.inference_mode():
            batch = torch.from_numpy(images)
            if config.family == "dino":
                tokens = network.get_intermediate_layers(batch, 1)[0].numpy()
                attention = network.get_last_selfattention(batch).numpy()
                return {"cls_token": tokens[:, 0], "patch_tokens": tokens[:, 1:], "attention": attention}
            features = network.forward_features(batch)
            named = {"cls_token": features["x_norm_clstoken"], "patch_tokens": features["x_norm_patchtokens"]}
            if config.num_register_tokens:
                named["register_tokens"] = features["x_norm_regtokens"]
            return {key: value.numpy() for key, value in named.items()}

    return Reference(f"torch.hub {_HUB[config.family].split(':')[0]} {name}", config, outputs)
