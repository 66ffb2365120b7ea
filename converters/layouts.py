"""Reduces checkpoint files to official names: without wrappers, prefixes, block chunks and Hugging Face names.

Known layouts: a bare backbone; DINO training checkpoints `{"student": …, "teacher": …, "args": …}` whose
entries hold `backbone.*` and `head.*`, the student's under `module.`; DINOv2 training checkpoints with
`teacher.backbone.*`, `teacher.dino_head.*` and chunked blocks (`blocks.CHUNK.INDEX.*`, the index counting through all
chunks); Hugging Face's DINO and DINOv2 files.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.tensors import raise_unless_named, raise_unless_readable, to_numpy
from dinojax.errors import UserError

_WRAPPERS = ("model", "state_dict")
_DEEPEST = 8  # dictionaries inside each other; a dictionary may hold itself
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
    unwrapped, _ = _unwrap(checkpoint, which)
    tensors = _strip(unwrapped, part, which)
    raise_unless_readable(tensors)
    state = {name: to_numpy(name, tensor) for name, tensor in tensors.items()}
    if any(name.startswith("embeddings.") for name in state):
        state = _from_hugging_face(state)
    return _unchunk(state)


def left_out(checkpoint: Mapping[str, Any], which: str) -> str | None:
    """One sentence on which of several networks is taken; None if the checkpoint leaves no choice.

    The entry `which` comes first, then "model", then "state_dict"; averages such as "model_ema" are never taken.
    """
    _, path = _unwrap(checkpoint, which)
    others = []
    for key in path:
        others += [
            str(other)
            for other, value in checkpoint.items()
            if other not in (key, "teacher", "student") and isinstance(value, Mapping) and _holds_tensors(value)
        ]
        checkpoint = checkpoint[key]
    return f"the weights are those of {path[-1]!r}; {', '.join(map(repr, others))} is left out" if others else None


def _holds_tensors(entry: Mapping[str, Any]) -> bool:
    return any(hasattr(value, "detach") or isinstance(value, np.ndarray) for value in entry.values())


def _unwrap(checkpoint: Mapping[str, Any], which: str) -> tuple[Mapping[str, Any], list[str]]:
    """Descends through nested dictionaries to the one that maps names to tensors; also the keys on the way."""
    path: list[str] = []
    while any(isinstance(value, Mapping) for value in checkpoint.values()):
        inner = next((key for key in (which, *_WRAPPERS) if isinstance(checkpoint.get(key), Mapping)), None)
        if inner is None:
            raise UserError(f"the checkpoint holds no {which!r} weights, only {_first(checkpoint)}")
        if len(path) == _DEEPEST:
            raise UserError(f"the checkpoint holds more than {_DEEPEST} dictionaries inside each other")
        checkpoint = checkpoint[inner]
        path.append(inner)
    if not checkpoint:
        raise UserError("the checkpoint holds no tensors")
    return checkpoint, path


def _first(names: Mapping[str, Any], count: int = 8) -> str:
    shown = sorted(str(name)[:40] for name in names)
    return ", ".join(map(repr, shown[:count])) + (f" and {len(shown) - count} more" if len(shown) > count else "")


def _strip(tensors: Mapping[str, Any], part: str, which: str) -> dict[str, Any]:
    """Removes prefixes, and the tensors of the other network and the other part."""
    raise_unless_named(tensors)
    tensors = dict(tensors)
    networks = {name.split(".")[0] for name in tensors} & {"teacher", "student"}
    if networks and which not in networks:
        raise UserError(f"the checkpoint holds no {which!r} weights, only those of the {networks.pop()!r}")
    other = "student." if which == "teacher" else "teacher."
    pending = [f"{which}.", *_PREFIXES[part]]
    while prefix := next((p for p in pending if any(name.startswith(p) for name in tensors)), None):
        beside = {name: v for name, v in tensors.items() if not name.startswith((prefix, other, *_COMPANIONS))}
        within = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
        if twice := within.keys() & beside.keys():
            raise UserError(f"two tensors of the checkpoint are named {min(twice)}, one of them {prefix}{min(twice)}")
        tensors = within | beside
    return tensors


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
