"""The settings of a DINOv3 reference file, in the words of several authors, as ours; others are refused by name."""

from typing import Any

import numpy as np

from dinojax import ViTConfig
from dinojax.models.layers import swiglu_hidden_dim
from dinojax.models.rope import periods

# Ours → the words that say it.
_SYNONYMS = {
    "img_size": ("img_size", "image_size"),
    "patch_size": ("patch_size",),
    "in_chans": ("in_chans", "num_channels"),
    "embed_dim": ("embed_dim", "hidden_size"),
    "depth": ("depth", "num_hidden_layers"),
    "num_heads": ("num_heads", "num_attention_heads"),
    "qkv_bias": ("qkv_bias",),
    "init_values": ("layerscale_init", "init_values", "layerscale_value"),
    "num_register_tokens": ("n_storage_tokens", "num_register_tokens", "num_storage_tokens"),
    "rope_base": ("pos_embed_rope_base", "rope_base", "rope_theta"),
    "layer_norm_eps": ("layer_norm_eps", "norm_eps"),
}
_ALIGNED = {"swiglu": 8, "swiglu32": 32, "swiglu64": 64, "swiglu128": 128, "swiglufused": 8}
_EPSILON = {"layernorm": 1e-6, "layernormbf16": 1e-5}
# Words for what we compute in one way only, and the values that say this way.
_FIXED: dict[str, tuple[Any, ...]] = {
    "pos_embed_rope_normalize_coords": ("separate",),
    "pos_embed_rope_min_period": (None,),
    "pos_embed_rope_max_period": (None,),
    "pos_embed_rope_dtype": ("fp32", "float32", "fp64", "float64", None),
    "ffn_bias": (True,),
    "proj_bias": (True,),
    "mlp_bias": (True,),
    "untie_cls_and_patch_norms": (False,),
    "hidden_act": ("gelu", "silu"),
}
# Of training alone, or of names alone.
_WITHOUT_EFFECT = (
    "pos_embed_rope_shift_coords",
    "pos_embed_rope_jitter_coords",
    "pos_embed_rope_rescale_coords",
    "untie_global_and_local_cls_norm",
    "drop_path_rate",
    "block_chunks",
    "device",
)


def dinov3_config(words: dict[str, Any], stored_periods: np.ndarray | None) -> ViTConfig:
    """Raises a `ValueError` that names a word, or a value, that is not computed."""
    words, found = dict(words), {}
    for ours, synonyms in _SYNONYMS.items():
        given = [words.pop(word) for word in synonyms if word in words]
        if given:
            found[ours] = given[0][0] if isinstance(given[0], list) else given[0]
    found |= _feed_forward(words, found["embed_dim"])
    if "norm_layer" in words:
        found["layer_norm_eps"] = _EPSILON[words.pop("norm_layer")]
    masked, key_bias = words.pop("mask_k_bias", None), words.pop("key_bias", None)
    found["key_bias"] = (not masked if masked is not None else bool(key_bias)) and found.get("qkv_bias", True)
    for word, value in words.items():
        if word not in _WITHOUT_EFFECT and value not in _FIXED.get(word, ()):
            raise ValueError(f"{word}={value!r} is not computed")
    config = ViTConfig(**{"rope_base": 100.0, "layer_norm_eps": 1e-5} | found)
    head_dim = config.embed_dim // config.num_heads
    if stored_periods is not None and not np.allclose(stored_periods, periods(head_dim, config.rope_base), rtol=1e-4):
        return ViTConfig(**config.settings() | {"rope_periods": "bfloat16"})
    return config


def _feed_forward(words: dict[str, Any], dim: int) -> dict[str, Any]:
    """Upstream's widths: a gated MLP has two thirds of the hidden channels, in multiples of a number."""
    ratio = next((words.pop(word) for word in ("ffn_ratio", "mlp_ratio") if word in words), 4)
    layer, hidden = words.pop("ffn_layer", "mlp"), words.pop("intermediate_size", None)
    if words.pop("use_gated_mlp", False):
        layer = "swiglu"
    if layer == "mlp":
        return {"ffn_layer": "mlp", "mlp_ratio": hidden / dim if hidden else ratio}
    step = _ALIGNED[layer]
    width = hidden or -(-int(int(dim * ratio) * 2 / 3) // step) * step
    return {"ffn_layer": "swiglufused", "mlp_ratio": 4 if width == swiglu_hidden_dim(dim, 4) else 1.5 * width / dim}
