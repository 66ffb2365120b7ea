"""Names of tensors: Hugging Face's and the official ones.

DINO is a plain ViT at Hugging Face, and DINOv2 has names of its own; DINOv3's are in `converters.dinov3`. `query`,
`key` and `value` are separate there; upstream fuses them along the output axis, in this order.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.dinov3.hugging_face import dinov3_name, to_dinov3_names

_POOLER = "pooler."  # Hugging Face's plain ViT has one; DINO was trained without

_OFFICIAL = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # DINOv2 (Dinov2Model) and DINO (ViTModel); files and modules of recent versions name some things differently.
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.", ""),
        (r"^layernorm\.", "norm."),
        (r"^(encoder\.layer|layers)\.", "blocks."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
        (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
        (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.mlp\.weights_in\.", ".mlp.w12."),
        (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.w3."),
    )
]
_FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}

# The head of DPTForDepthEstimation on a Dinov2 → the official names.
_OFFICIAL_DPT = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^neck\.reassemble_stage\.layers\.(\d+)\.projection\.", r"reassemble_blocks.projects.\1.conv."),
        (r"^neck\.reassemble_stage\.layers\.(\d+)\.resize\.", r"reassemble_blocks.resize_layers.\1."),
        (r"^neck\.reassemble_stage\.", "reassemble_blocks."),
        (r"^neck\.convs\.(\d+)\.", r"convs.\1.conv."),
        (r"^neck\.fusion_stage\.layers\.", "fusion_blocks."),
        (r"^(fusion_blocks\.\d+)\.projection\.", r"\1.project.conv."),
        (r"\.residual_layer(\d)\.convolution(\d)\.", r".res_conv_unit\1.conv\2.conv."),
        (r"^head\.projection\.", "project.conv."),
        (r"^head\.head\.", "conv_depth.head."),
    )
]
_UNUSED_DPT = "neck.fusion_stage.layers.0.residual_layer1."  # the coarsest map has no finer one to add to

# Official names → those of Hugging Face's files, which every version of transformers reads.
_TO_HUGGING_FACE = (
    (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.(query|key|value)\.", r".attention.attention.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"\.mlp\.w12\.", ".mlp.weights_in."),
    (r"\.mlp\.w3\.", ".mlp.weights_out."),
)
_TO_PLAIN_VIT = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def from_hugging_face(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same tensors under official names; those of the pooler are left out."""
    renamed = {}
    for name, array in state.items():
        if name.startswith(_POOLER):
            continue
        for pattern, replacement in _OFFICIAL:
            name = pattern.sub(replacement, name)
        renamed[name] = array
    for fused, parts in _FUSED.items():
        for name in [name for name in renamed if f".{parts[0]}." in name]:
            names = [name.replace(parts[0], part) for part in parts]
            if all(piece in renamed for piece in names):
                renamed[name.replace(parts[0], fused)] = np.concatenate([renamed.pop(piece) for piece in names])
    return renamed


def dpt_from_hugging_face(state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the head of DPTForDepthEstimation under official names, without those that are never used."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(_UNUSED_DPT):
            continue
        for pattern, replacement in _OFFICIAL_DPT:
            name = pattern.sub(replacement, name)
        renamed[name] = tensor
    return renamed


def to_hugging_face(state: Mapping[str, np.ndarray], family: str | None) -> dict[str, np.ndarray]:
    """Tensors under official names, such as `converters.to_torch` gives, under those of Hugging Face's files.

    Args:
        state: official name → array, in torch's layout.
        family: "dino", "dinov2" or "dinov3".
    """
    if family == "dinov3":
        return to_dinov3_names(state)
    renamed: dict[str, np.ndarray] = {}
    for name, array in state.items():
        if ".attn.qkv." in name:
            pieces = zip(("query", "key", "value"), np.split(array, 3))
            renamed |= {hugging_face_name(name.replace("qkv", part), family): piece for part, piece in pieces}
        else:
            renamed[hugging_face_name(name, family)] = array
    return renamed


def hugging_face_name(name: str, family: str | None) -> str:
    """The name of a tensor in Hugging Face's files; the parts of `attn.qkv` are `attn.query`, `attn.key`, `attn.value`.

    Args:
        name: the official name, such as "blocks.0.norm1.weight".
        family: "dino", "dinov2" or "dinov3".
    """
    if family == "dinov3":
        return dinov3_name(name)
    for pattern, replacement in _TO_HUGGING_FACE + (_TO_PLAIN_VIT if family == "dino" else ()):
        name = re.sub(pattern, replacement, name)
    return name
