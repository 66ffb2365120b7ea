"""Official files of DINOv3: their names where DINOv2's differ, and the buffers in them, which are checked and left out.

A file holds `storage_tokens` (registers), `w1` and `w2` of a gated MLP apart, no position table, and two kinds of
buffers: `rope_embed.periods`, the periods of the rotation, and `blocks.N.attn.qkv.bias_mask`, which keeps the biases of
the keys at zero. `local_cls_norm` normalises class tokens of small crops in pretraining and has no part in features.

Source: the names and shapes of the files, as arXiv 2508.10104 and Hugging Face's transformers describe the model.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dinojax.errors import UserError
from dinojax.models.config import ViTConfig
from dinojax.models.rope import Periods, periods
from dinojax.models.variants import VARIANTS

LICENSE = "DINOv3 License"
LICENSE_URL = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
FORM_URL = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
TERMS = (
    f"weights of DINOv3 that Meta published are under the {LICENSE}, not under that of dinojax, and so are files made "
    f"of them: {LICENSE_URL}"
)
_BASE = 100.0  # of every published model
_FORMATS: dict[Periods, float] = {"float32": 1e-5, "bfloat16": 1e-6}  # rounding → largest relative difference
_PERIODS = "rope_embed.periods"
_MASK = ".qkv.bias_mask"
_ONLY_PRETRAINING = "local_cls_norm."


def is_dinov3(state: Mapping[str, Any]) -> bool:
    """Whether a state dict has DINOv3's own tensors, and no position table."""
    own = any(name in (_PERIODS, "storage_tokens") or name.endswith(_MASK) for name in state)
    return own and "pos_embed" not in state


def without_buffers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of a DINOv3 under DINOv2's names; where a mask says so, biases of queries and values alone.

    Raises:
        UserError: a mask that does not keep exactly the biases of the keys at zero.
    """
    renamed = {}
    for name, array in state.items():
        if name.endswith(_MASK) and name.removesuffix("_mask") not in state:
            raise UserError(f"missing {name.removesuffix('_mask')}, of which {name} is the mask")
        if name == _PERIODS or name.endswith(_MASK) or name.startswith(_ONLY_PRETRAINING):
            continue
        if name.endswith(".qkv.bias") and (mask := state.get(f"{name}_mask")) is not None:
            _raise_unless_mask(f"{name}_mask", mask, array)
            query, _, value = np.split(array, 3)
            array = np.concatenate([query, value])
        if name == "storage_tokens":
            name = "register_tokens"
            if array.ndim == 3 and array.shape[1] == 0:
                continue
        renamed[name] = array
    for gate in [name for name in renamed if re.search(r"\.mlp\.w1\.", name)]:
        gated = gate.replace(".w1.", ".w2.")
        if gated in renamed:
            renamed[gate.replace(".w1.", ".w12.")] = np.concatenate([renamed.pop(gate), renamed.pop(gated)])
    return renamed


def official(state: Mapping[str, np.ndarray], config: ViTConfig) -> dict[str, np.ndarray]:
    """Parameters under DINOv2's names → a state dict as Meta's files hold it, with the buffers."""
    head_dim, base = config.embed_dim // config.num_heads, config.rope_base or _BASE
    named: dict[str, np.ndarray] = {}
    for name, array in state.items():
        if name.endswith(".qkv.bias") and not config.key_bias:
            query, value = np.split(array, 2)
            none, one = np.zeros_like(query), np.ones_like(query)
            named |= {name: np.concatenate([query, none, value]), f"{name}_mask": np.concatenate([one, none, one])}
        elif ".mlp.w12." in name:
            named |= {name.replace(".w12.", f".w{i}."): half for i, half in zip((1, 2), np.split(array, 2))}
        else:
            named["storage_tokens" if name == "register_tokens" else name] = array
    return named | {_PERIODS: periods(head_dim, base, config.rope_periods).astype(np.float32)}


def infer_rotation(state: Mapping[str, np.ndarray], num_heads: int | None) -> dict[str, Any]:
    """The settings `num_heads`, `rope_base` and `rope_periods` of a state dict.

    Stored periods say all three. Without them, `num_heads` is that of the published model of this size, or else None,
    and the base is 100.

    Raises:
        UserError: `num_heads` is not what the stored periods say, or they are no periods.
    """
    embed_dim = state["patch_embed.proj.weight"].shape[0]
    stored = state.get(_PERIODS)
    if stored is None:
        published = {config.embed_dim: config.num_heads for config in VARIANTS.values() if config.family == "dinov3"}
        return {"num_heads": num_heads or published.get(embed_dim), "rope_base": _BASE, "rope_periods": "float32"}
    if stored.ndim != 1 or not stored.size or embed_dim % (4 * stored.size):
        raise UserError(f"misshapen {_PERIODS} {stored.shape}: a quarter of the channels of a head was expected")
    heads = embed_dim // (4 * stored.size)
    if num_heads not in (None, heads):
        raise UserError(f"{_PERIODS} has {stored.size} periods, which are those of {heads} heads, not of {num_heads}")
    last, bases = float(stored[-1]), [_BASE]
    if stored.size > 1 and 1.001 < last < 2**32:
        bases.append(float(f"{last ** (stored.size / (stored.size - 1)):.6g}"))
    for base in bases:
        if rounded_to := _rounding(stored, base):
            return {"num_heads": heads, "rope_base": base, "rope_periods": rounded_to}
    raise UserError(f"{_PERIODS} from {stored[0]:g} to {stored[-1]:g} are not powers of one base, as DINOv3's are")


def with_stored_periods(config: ViTConfig, state: Mapping[str, np.ndarray]) -> ViTConfig:
    """The configuration with the rounding of the stored periods, if there are any.

    Raises:
        UserError: they are not those of its heads and base.
    """
    stored, base = state.get(_PERIODS), config.rope_base
    if stored is None or base is None:
        return config
    count = config.embed_dim // config.num_heads // 4
    rounded_to = _rounding(stored, base) if stored.shape == (count,) else None
    if rounded_to is None:
        shown = ", ".join(f"{value:.5g}" for value in stored.flat[:3])
        raise UserError(
            f"{_PERIODS} {stored.shape} ({shown}, …) are not the {count} periods of rope_base={base:g} with "
            f"num_heads={config.num_heads}"
        )
    return dataclasses.replace(config, rope_periods=rounded_to)


def where_to_get(name: str) -> str:
    """One sentence on where the weights of a published model are, which dinojax neither ships nor downloads."""
    folder = f"facebook/{name.replace('_', '-').removesuffix('-sat493m')}"
    folder += "-pretrain-sat493m" if name.endswith("sat493m") else "-pretrain-lvd1689m"
    return (
        f"weights of {name} are not downloaded, because they are under the {LICENSE} ({LICENSE_URL}): accept it at "
        f"{FORM_URL} or at https://huggingface.co/{folder}, and pass the file or folder (weights=, --weights)"
    )


def _rounding(stored: np.ndarray, base: float) -> Periods | None:
    """The rounding of stored periods; None if they are not those of `base`."""
    for rounded_to, largest in _FORMATS.items():
        if np.allclose(stored, periods(4 * stored.size, base, rounded_to), rtol=largest, atol=0):
            return rounded_to
    return None


def _raise_unless_mask(name: str, mask: np.ndarray, bias: np.ndarray) -> None:
    if mask.shape != bias.shape or bias.ndim != 1 or len(bias) % 3:
        raise UserError(f"misshapen {name} {mask.shape}: the shape {bias.shape} of the bias was expected")
    expected = np.repeat([1.0, 0.0, 1.0], len(bias) // 3)
    if not np.array_equal(mask, expected):
        raise UserError(f"{name} is not one for queries and values and zero for keys, as DINOv3's is")
