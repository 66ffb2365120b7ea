"""Reduces checkpoint files to official names: without wrappers, prefixes, block chunks and Hugging Face names.

Known layouts: a bare backbone; DINO training checkpoints `{"student": …, "teacher": …, "args": …}` whose
entries hold `backbone.*` and `head.*`, the student's under `module.`; DINOv2 training checkpoints with
`teacher.backbone.*`, `teacher.dino_head.*` and chunked blocks (`blocks.CHUNK.INDEX.*`, the index counting through all
chunks); Hugging Face's DINO and DINOv2 files.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dinojax.errors import UserError

_WRAPPERS = ("model", "state_dict")
_PREFIXES = {
    "backbone": ("module.", "_orig_mod.", "backbone.", "dinov2.", "dinov2_with_registers."),
    "head": ("module.", "_orig_mod.", "head.", "dino_head."),
}
# Prefixes of other parts that a checkpoint may hold; anything else is reported as an extra tensor.
_COMPANIONS = ("backbone.", "head.", "dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.", "classifier.")
_POOLER = "pooler."  # Hugging Face's plain ViT has one; DINO was trained without

_HUGGING_FACE = [
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
# Hugging Face stores these separately; upstream fuses them along the output axis in this order.
_FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}


def part_of_checkpoint(checkpoint: Mapping[str, Any], *, part: str, which: str) -> dict[str, np.ndarray]:
    """The tensors of the backbone or the head of one network: bare official name → numpy array.

    Args:
        checkpoint: a state dict, or dictionaries around one.
        part: "backbone" or "head".
        which: "teacher" or "student", for checkpoints that hold both.

    Raises:
        UserError: there is no such network in the checkpoint, two tensors have the same name, or a value is not a
            float tensor.
    """
    if which not in ("teacher", "student"):
        raise UserError(f"which={which!r} is not 'teacher' or 'student'")
    tensors = _strip(_unwrap(checkpoint, which), part, which)
    state = {name: _to_numpy(name, tensor) for name, tensor in tensors.items()}
    if any(name.startswith("embeddings.") for name in state):
        state = _from_hugging_face(state)
    return _unchunk(state)


def _unwrap(checkpoint: Mapping[str, Any], which: str) -> Mapping[str, Any]:
    """Descends through nested dictionaries to the one that maps names to tensors."""
    while any(isinstance(value, Mapping) for value in checkpoint.values()):
        inner = next((key for key in (which, *_WRAPPERS) if isinstance(checkpoint.get(key), Mapping)), None)
        if inner is None:
            raise UserError(f"the checkpoint holds no {which!r} weights, only {sorted(map(str, checkpoint))}")
        checkpoint = checkpoint[inner]
    if not checkpoint:
        raise UserError("the checkpoint holds no tensors")
    return checkpoint


def _strip(tensors: Mapping[str, Any], part: str, which: str) -> dict[str, Any]:
    """Removes prefixes, and the tensors of the other network and the other part."""
    tensors = dict(tensors)
    networks = {name.split(".")[0] for name in tensors} & {"teacher", "student"}
    if networks and which not in networks:
        raise UserError(f"the checkpoint holds no {which!r} weights, only those of the {networks.pop()!r}")
    other = "student." if which == "teacher" else "teacher."
    pending = [f"{which}.", *_PREFIXES[part]]
    while prefix := next((p for p in pending if any(name.startswith(p) for name in tensors)), None):
        beside = {name: v for name, v in tensors.items() if not name.startswith((prefix, other, *_COMPANIONS))}
        tensors = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)} | beside
    return tensors


def _to_numpy(name: str, tensor: Any) -> np.ndarray:
    """A float32 or float64 array; half precision is widened."""
    if hasattr(tensor, "detach"):  # a torch tensor; bfloat16 has no numpy counterpart
        tensor = tensor.detach().cpu()
        tensor = (tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor).numpy()
    if not isinstance(tensor, np.ndarray):
        raise UserError(f"{name} is of type {type(tensor).__name__} but a tensor was expected")
    if not jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating):
        raise UserError(f"{name} holds {tensor.dtype} but floating-point numbers were expected")
    return tensor if tensor.dtype == np.float64 else tensor.astype(np.float32)


def _from_hugging_face(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, array in state.items():
        if name.startswith(_POOLER):
            continue
        for pattern, replacement in _HUGGING_FACE:
            name = pattern.sub(replacement, name)
        renamed[name] = array
    for fused, parts in _FUSED.items():
        for name in [name for name in renamed if f".{parts[0]}." in name]:
            names = [name.replace(parts[0], part) for part in parts]
            if all(piece in renamed for piece in names):
                renamed[name.replace(parts[0], fused)] = np.concatenate([renamed.pop(piece) for piece in names])
    return renamed


def _unchunk(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`blocks.CHUNK.INDEX.*` → `blocks.INDEX.*`."""
    flat: dict[str, np.ndarray] = {}
    for name, array in state.items():
        bare = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)
        if bare in flat:
            raise UserError(f"two tensors of the checkpoint are named {bare}, one of them {name}")
        flat[bare] = array
    return flat
