"""Hugging Face's side of DINOv3 (`dinov3_vit`): names of tensors both ways, and the settings beside them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.dinov3.official import without_buffers
from dinojax.errors import UserError
from dinojax.models.config import ViTConfig

MODEL_TYPE = "dinov3_vit"
_MARK = "embeddings.patch_embeddings.weight"  # a convolution of its own name in the other models
_OFFICIAL = (
    (r"^embeddings\.register_tokens$", "storage_tokens"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(model\.|encoder\.)?layer\.", "blocks."),  # files: layer.N; modules of transformers 5: model.layer.N
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
_PLAIN = ((r"\.mlp\.up_proj\.", ".mlp.fc1."), (r"\.mlp\.down_proj\.", ".mlp.fc2."))
_GATED = (
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w2."),
    (r"\.mlp\.down_proj\.", ".mlp.w3."),
)
_TO_HUGGING_FACE = (
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^blocks\.", "layer."),
    (r"\.attn\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.(fc1|w2)\.", ".mlp.up_proj."),
    (r"\.mlp\.(fc2|w3)\.", ".mlp.down_proj."),
    (r"\.mlp\.w1\.", ".mlp.gate_proj."),
)


def has_dinov3_names(state: Mapping[str, Any]) -> bool:
    """Whether the names are those of `DINOv3ViTModel`."""
    return _MARK in state


def from_dinov3_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of `DINOv3ViTModel` under official names; biases of queries and values alone are "2·dim"."""
    gated = any(".mlp.gate_proj." in name for name in state)
    renamed = {}
    for name, array in state.items():
        if name == "rope_embeddings.inv_freq":
            with np.errstate(divide="ignore"):
                name, array = "rope_embed.periods", 1 / array
        for pattern, replacement in _OFFICIAL + (_GATED if gated else _PLAIN):
            name = re.sub(pattern, replacement, name)
        if name == "mask_token" and array.ndim == 3:
            array = array.reshape(1, -1)
        renamed[name] = array
    for query in [name for name in renamed if ".attn.q." in name]:
        parts = [query.replace(".q.", f".{part}.") for part in "qkv"]
        if query.endswith(".bias") and parts[1] not in renamed:
            del parts[1]
        if all(part in renamed for part in parts):
            renamed[query.replace(".q.", ".qkv.")] = np.concatenate([renamed.pop(part) for part in parts])
    return renamed


def to_dinov3_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under official names, such as `converters.to_torch` gives, under those of Hugging Face's files."""
    renamed: dict[str, np.ndarray] = {}
    state = without_buffers(state)
    dim = state["cls_token"].shape[-1]
    if "register_tokens" not in state:
        state["register_tokens"] = np.zeros((1, 0, dim), np.float32)
    for name, array in state.items():
        parts = ("query", "key", "value") if len(array) == 3 * dim else ("query", "value")
        if ".attn.qkv." in name:
            pieces = {name.replace("qkv", part): piece for part, piece in zip(parts, np.split(array, len(parts)))}
        elif ".mlp.w12." in name:
            pieces = {name.replace("w12", part): piece for part, piece in zip(("w1", "w2"), np.split(array, 2))}
        else:
            pieces = {name: array.reshape(1, 1, -1) if name == "mask_token" else array}
        renamed |= {dinov3_name(name): piece for name, piece in pieces.items()}
    return renamed


def dinov3_name(name: str) -> str:
    """The name of a tensor in Hugging Face's files; the parts are `attn.query` (`key`, `value`) and `mlp.w1` (`w2`)."""
    for pattern, replacement in _TO_HUGGING_FACE:
        name = re.sub(pattern, replacement, name)
    return name


def model_settings(config: ViTConfig, hidden: int) -> dict[str, Any]:
    """Hugging Face's `config.json` of a DINOv3 whose feed-forward networks are `hidden` wide.

    Raises:
        UserError: transformers has no such architecture.
    """
    if config.init_values is None:
        raise UserError("transformers' DINOv3 always has LayerScale, and this model has none: --to torch writes it")
    gated = config.ffn_layer != "mlp"
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": MODEL_TYPE,
        "hidden_size": config.embed_dim,
        "intermediate_size": hidden,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "num_register_tokens": config.num_register_tokens,
        "query_bias": config.qkv_bias,
        "key_bias": config.qkv_bias and config.key_bias,
        "value_bias": config.qkv_bias,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "layer_norm_eps": config.layer_norm_eps,
        "rope_theta": config.rope_base,
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "layerscale_value": 1.0,
    }


def stated_fields(path: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` says of a DINOv3 and its tensors do not: fields of `ViTConfig`; {} for other models.

    Raises:
        UserError: a value that is no number.
    """
    if settings.get("model_type") != MODEL_TYPE:
        return {}
    found = {}
    for word, name in {"layer_norm_eps": "layer_norm_eps", "rope_theta": "rope_base", "image_size": "img_size"}.items():
        value = settings.get(word)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]  # height and width
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int if word == "image_size" else int | float):
            raise UserError(f"{path}: config.json has {word} = {settings[word]!r:.40}, not a number")
        found[name] = value
    return found


def computed(settings: Mapping[str, Any], config: ViTConfig) -> dict[str, Any]:
    """Setting → the value that the model computes with, for those of `config.json` that tensors do not show or may not.

    What is missing there has the default of `transformers`.
    """
    gated = config.ffn_layer != "mlp"
    expected = {
        "hidden_act": ("gelu", "silu" if gated else "gelu"),
        "use_gated_mlp": (False, gated),
        "query_bias": (True, config.qkv_bias),
        "value_bias": (True, config.qkv_bias),
        "key_bias": (False, config.qkv_bias and config.key_bias),
        "proj_bias": (True, True),
        "mlp_bias": (True, True),
    }
    return {name: wanted for name, (default, wanted) in expected.items() if settings.get(name, default) != wanted}
