"""Official PyTorch state dicts → Flax modules, and back; missing and extra tensors are refused.

Parameter paths are upstream's, so three rules suffice: a 4-D `weight` becomes `kernel`, OIHW → HWIO; a 2-D `weight`
becomes `kernel`, transposed; a 1-D `weight` becomes `scale`. All other names and layouts are the same. Before that,
`converters.layouts` removes wrappers and prefixes.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from converters.dinov3.official import infer_rotation, is_dinov3, official, with_stored_periods, without_buffers
from converters.huggingface.positions import with_positions
from converters.layouts import part_of_checkpoint
from dinojax.errors import UserError
from dinojax.models.config import ViTConfig
from dinojax.models.files import Network, abstract_model, raise_unless_same, with_parameters
from dinojax.models.head import DINOHead
from dinojax.models.layers import swiglu_hidden_dim
from dinojax.models.vit import VisionTransformer


def from_torch(
    state_dict: Mapping[str, Any],
    *,
    config: ViTConfig | None = None,
    num_heads: int | None = None,
    which: str = "teacher",
    stated: Mapping[str, Any] | None = None,
) -> VisionTransformer:
    """Builds the backbone that an official checkpoint describes.

    Args:
        state_dict: torch tensors or numpy arrays under official names (DINO, DINOv2, DINOv3, also wrapped, prefixed or
            chunked) or under Hugging Face's names.
        config: the architecture; None infers it from names and shapes, with antialias and offset 0 for models with
            registers, and offset 0.1 for others. A DINOv3 has LayerNorm eps 1e-5, and the periods that are stored
            beside its tensors, or else those of base 100.
        num_heads: number of attention heads, which shapes do not determine; None means 64 channels per head, as in
            all published models of DINO and DINOv2; in DINOv3 as many as stored periods or the published model say.
        which: the network to take from a training checkpoint, "teacher" or "student". Among other entries, "model"
            comes before "state_dict", and averages such as "model_ema" are not taken.
        stated: fields of the configuration of a DINOv3 that its tensors do not tell, such as `layer_norm_eps`, if they
            are known from elsewhere; of no effect on other models.

    Returns:
        The model in float32, or in float64 if the checkpoint is and jax has it enabled.

    Raises:
        UserError: a missing, extra or misshapen tensor (the message names all), no such network, or not a state dict.
    """
    state = part_of_checkpoint(state_dict, part="backbone", which=which)
    if config is None:
        config = infer_config(state, num_heads)
        if stated and config.family == "dinov3":
            config = dataclasses.replace(config, **stated)
    elif "mask_token" in state and config.family == "dino":
        config = dataclasses.replace(config, family="dinov2")
    if config.family == "dinov3":
        config, state = with_stored_periods(config, state), without_buffers(state)
    return fill(abstract_model(config), state)


def head_from_torch(
    state_dict: Mapping[str, Any], *, which: str = "teacher", norm_last_layer: bool | None = None
) -> DINOHead:
    """Builds the DINO head of a checkpoint.

    Args:
        state_dict: as for `from_torch`; names bare (`mlp.0.weight`), or under `head.`, `teacher.head.`, `dino_head.`.
        which: the network to take from a training checkpoint, "teacher" or "student".
        norm_last_layer: whether the lengths of the prototypes are frozen; None means yes if all are exactly one.

    Raises:
        UserError: a missing, extra or misshapen tensor (the message names all), or no head.
    """
    state = part_of_checkpoint(state_dict, part="head", which=which)
    layers = [n for n in sorted(state) if re.fullmatch(r"mlp\.([0-9]{1,9}\.)?weight", n) and state[n].ndim == 2]
    lengths = state.get("last_layer.weight_g")
    if not layers or lengths is None or "last_layer.weight_v" not in state:
        raise UserError(
            f"no DINO head: mlp.*.weight, last_layer.weight_g and last_layer.weight_v were expected among {_few(state)}"
        )
    layers.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    if state["last_layer.weight_v"].ndim != 2:
        raise UserError(f"misshapen last_layer.weight_v {state['last_layer.weight_v'].shape}: 2 axes were expected")
    prototypes, bottleneck_dim = state["last_layer.weight_v"].shape
    if norm_last_layer is None:
        norm_last_layer = bool(np.all(lengths == 1))
    sizes = {
        "in_dim": state[layers[0]].shape[1],
        "out_dim": prototypes,
        "hidden_dim": state[layers[0]].shape[0],
        "bottleneck_dim": bottleneck_dim,
        "nlayers": len(layers),
    }
    return fill(nnx.eval_shape(lambda: DINOHead(**sizes, norm_last_layer=norm_last_layer, rngs=nnx.Rngs(0))), state)


def fill(module: Network, state: Mapping[str, np.ndarray]) -> Network:
    """A copy of `module` (real or abstract) with the official tensors `state` as its parameters.

    Raises:
        UserError: a missing, extra or misshapen tensor; the message has upstream's names.
    """
    rules = {path: _rule(path, param.shape) for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    raise_unless_same(official_shapes(module), {name: array.shape for name, array in state.items()})
    return with_parameters(
        module, {".".join(map(str, path)): state[rule.name].transpose(rule.axes) for path, rule in rules.items()}
    )


def official_shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Official name → shape of each parameter of a module (real or abstract) in torch's layout."""
    rules = (_rule(path, param.shape) for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param)))
    return {rule.name: rule.shape for rule in rules}


def to_torch(module: nnx.Module) -> dict[str, np.ndarray]:
    """Official name → parameter of a backbone or head in torch's layout; the inverse of `from_torch`.

    With `torch.tensor` around each array, `load_state_dict` of upstream's modules takes it. A DINOv3 comes with the
    buffers that official files have, see `converters.dinov3`.
    """
    params = nnx.to_flat_state(nnx.state(module, nnx.Param))
    rules = ((_rule(path, param.shape), param) for path, param in params)
    state = {rule.name: np.asarray(param[...]).transpose(np.argsort(rule.axes)) for rule, param in rules}
    if isinstance(module, VisionTransformer) and module.config.family == "dinov3":
        return official(state, module.config)
    return state


_DINOV3_EPSILON = 1e-5  # of every LayerNorm in the published models
# What `infer_config` looks at.
_AXES = {
    "patch_embed.proj.weight": 4,
    "pos_embed": 3,
    "register_tokens": 3,
    "blocks.0.mlp.fc1.weight": 2,
    "blocks.0.mlp.w12.weight": 2,
}


class _Rule(NamedTuple):
    """Name and shape of an official tensor, and the order of its axes in the Flax parameter."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def _rule(path: tuple[Any, ...], shape: tuple[int, ...]) -> _Rule:
    """The official counterpart of the parameter at `path`."""
    *parents, leaf = map(str, path)
    axes = tuple(range(len(shape)))
    if leaf == "kernel":
        axes = (2, 3, 1, 0) if len(shape) == 4 else (1, 0)
    official_shape = tuple(shape[axes.index(axis)] for axis in range(len(shape)))
    return _Rule(".".join([*parents, "weight" if leaf in ("kernel", "scale") else leaf]), official_shape, axes)


def infer_config(state: Mapping[str, np.ndarray], num_heads: int | None = None) -> ViTConfig:
    """Infers the configuration from the names and shapes of official tensors.

    Raises:
        UserError: the tensors are not those of a backbone, or `num_heads` cannot be inferred.
    """
    v3 = is_dinov3(state)
    needed = (*(() if v3 else ("pos_embed",)), "patch_embed.proj.weight", "blocks.0.norm1.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        kind = "DINOv3" if v3 else "DINO or DINOv2"
        raise UserError(f"not a {kind} backbone: {', '.join(missing)} missing among {_few(state)}")
    found = without_buffers(state) if v3 else state
    for name, axes in _AXES.items():
        if name in found and (found[name].ndim != axes or 0 in found[name].shape):
            raise UserError(f"misshapen {name} {found[name].shape}: {axes} axes were expected, none of them empty")
    embed_dim, in_chans, patch_size, _ = found["patch_embed.proj.weight"].shape
    own = _of_dinov3(state, found, num_heads) if v3 else _of_dino(found, num_heads)
    if own["num_heads"] is None and embed_dim % 64:
        raise UserError(
            f"num_heads cannot be inferred from embed_dim={embed_dim}, which 64 does not divide: pass num_heads"
        )
    own["num_heads"] = own["num_heads"] or embed_dim // 64
    config = ViTConfig(
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=_depth(found),
        **_feed_forward(found, embed_dim),
        qkv_bias="blocks.0.attn.qkv.bias" in found,
        init_values=1.0 if "blocks.0.ls1.gamma" in found else None,
        num_register_tokens=found["register_tokens"].shape[1] if "register_tokens" in found else 0,
        in_chans=in_chans,
        **own,
    )
    return with_positions(config, "hub")


def _of_dino(state: Mapping[str, np.ndarray], num_heads: int | None) -> dict[str, Any]:
    """Settings of DINO and DINOv2: the size of the position table, and the family."""
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    only_v2 = {"mask_token", "register_tokens", "blocks.0.ls1.gamma", "blocks.0.mlp.w12.weight"}
    family = "dinov2" if only_v2 & set(state) else "dino"
    img_size = side * state["patch_embed.proj.weight"].shape[3]
    return {"img_size": img_size, "family": family, "num_heads": num_heads}


def _of_dinov3(
    state: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], num_heads: int | None
) -> dict[str, Any]:
    """Settings of a DINOv3: `state` has the buffers, and `found` what is left without them."""
    dim, _, patch, _ = found["patch_embed.proj.weight"].shape
    bias = found.get("blocks.0.attn.qkv.bias")
    return {
        "img_size": max(1, 224 // patch) * patch,  # of no consequence for features
        "family": "dinov3",
        "key_bias": bias is not None and bias.shape == (3 * dim,),
        "layer_norm_eps": _DINOV3_EPSILON,
        **infer_rotation(state, num_heads),
    }


def _depth(state: Mapping[str, np.ndarray]) -> int:
    """The number of blocks; a few may be missing, which `fill` names."""
    numbers = {int(found[1]) for name in state if (found := re.match(r"blocks\.([0-9]{1,9})\.", name))}
    depth = 1 + max(numbers)
    if depth > 2 * len(numbers):
        raise UserError(
            f"blocks.{depth - 1} is named among only {len(numbers)} blocks; the file is damaged or no ViT's"
        )
    return depth


def _feed_forward(state: Mapping[str, np.ndarray], embed_dim: int) -> dict[str, Any]:
    if "blocks.0.mlp.w12.weight" not in state:
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in state else 4 * embed_dim
        return {"ffn_layer": "mlp", "mlp_ratio": hidden / embed_dim}
    hidden = state["blocks.0.mlp.w12.weight"].shape[0] // 2
    ratio = 4 if swiglu_hidden_dim(embed_dim, 4) == hidden else 1.5 * hidden / embed_dim
    return {"ffn_layer": "swiglufused", "mlp_ratio": ratio}


def _few(state: Mapping[str, Any]) -> str:
    names = list(state)
    return f"{len(names)} names such as {', '.join(names[:3])}" if names else "no names at all"
