"""PyTorch beside our heads: `transformers` for DPT, and upstream's linear heads written out again in torch."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

BLOCKS = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}

# Names of `transformers` → those of the official files.
_OFFICIAL = (
    (r"^neck\.reassemble_stage\.layers\.(\d)\.projection\.", r"reassemble_blocks.projects.\1.conv."),
    (r"^neck\.reassemble_stage\.layers\.(\d)\.resize\.", r"reassemble_blocks.resize_layers.\1."),
    (r"^neck\.reassemble_stage\.readout_projects\.", "reassemble_blocks.readout_projects."),
    (r"^neck\.convs\.(\d)\.", r"convs.\1.conv."),
    (r"^neck\.fusion_stage\.layers\.(\d)\.projection\.", r"fusion_blocks.\1.project.conv."),
    (r"^neck\.fusion_stage\.layers\.(\d)\.residual_layer(\d)\.convolution(\d)\.",
     r"fusion_blocks.\1.res_conv_unit\2.conv\3.conv."),
    (r"^head\.projection\.", "project.conv."),
    (r"^head\.head\.", "conv_depth.head."),
)  # fmt: skip


def dpt(embed_dim: int, depth: int, num_heads: int, **settings: Any) -> Any:
    """DPTForDepthEstimation on a Dinov2, as the official weights were converted to it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    backbone = transformers.Dinov2Config(
        hidden_size=embed_dim,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        patch_size=14,
        out_indices=[block + 1 for block in BLOCKS[depth]],
        apply_layernorm=False,
        reshape_hidden_states=False,
        **settings,
    )
    config = transformers.DPTConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim],
        use_bias_in_fusion_residual=False,
        add_projection=True,
    )
    return transformers.DPTForDepthEstimation(config).eval()


def randomize(model: Any) -> Any:
    """Values that keep activations near one, in every parameter."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            spread = torch.randn_like(parameter)
            parameter.copy_(spread / fan_in**0.5 if parameter.ndim > 1 else 0.3 * spread + 0.5)
        if hasattr(model, "head"):
            last = model.head.head[4]  # its ReLU would hide what is below zero
            last.weight *= -0.3
            last.bias += 1
    return model


def official_dpt_state(model: Any) -> dict[str, Any]:
    """The tensors of the head of `dpt` under official names; the first block of the fusion has one unit there."""
    found = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone.") or ".layers.0.residual_layer1." in name:
            continue
        for pattern, replacement in _OFFICIAL:
            name = re.sub(pattern, replacement, name)
        found[f"decode_head.{name}"] = tensor
    return found


def backbone_state(model: Any) -> dict[str, Any]:
    """The tensors of the backbone of `dpt`, under the names of `transformers`."""
    return {name.removeprefix("backbone."): x for name, x in model.state_dict().items() if name.startswith("backbone.")}


def tokens_of(model: Any, images: np.ndarray, *, norm: bool = False, shift: int = 0) -> list[tuple[Any, Any]]:
    """Maps of patch tokens "batch dim rows columns" and class tokens of the four blocks, of whole patches."""
    import torch

    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    rows, columns = (side // 14 for side in images.shape[1:3])
    backbone = model.backbone
    with torch.no_grad():
        hidden = backbone(pixels, output_hidden_states=True).hidden_states
        layers = [hidden[block + 1 - shift] for block in BLOCKS[len(hidden) - 1]]
        layers = [backbone.layernorm(layer) for layer in layers] if norm else layers
    return [(x[:, 1:].transpose(1, 2).unflatten(2, (rows, columns)), x[:, 0]) for x in layers]


def linear_depth(
    layers: list[tuple[Any, Any]],
    state: Mapping[str, Any],
    max_depth: float,
    *,
    align_corners: bool = False,
    join_cls: bool = True,
) -> Any:
    """Upstream's linear depth head on the tokens of some blocks, step by step as there."""
    import torch
    from torch.nn import functional

    joined = []
    for patches, cls_token in layers:
        beside = cls_token[:, :, None, None].expand_as(patches) if join_cls else torch.zeros_like(patches)
        x = torch.cat([patches, beside], dim=1)
        size = [4 * side for side in x.shape[2:]]
        joined.append(functional.interpolate(x, size, mode="bilinear", align_corners=align_corners))
    weight, bias = state["decode_head.conv_depth.weight"], state["decode_head.conv_depth.bias"]
    logits = torch.relu(functional.conv2d(torch.cat(joined, dim=1), weight, bias)) + 0.1
    weights = logits / logits.sum(dim=1, keepdim=True)
    bins = torch.linspace(0.001, max_depth, len(bias))
    return torch.einsum("nbhw,b->nhw", weights, bins)


def padded(images: np.ndarray) -> np.ndarray:
    """Images in the middle of zeros, with whole patches of 14 px; of an odd number, one more after them."""
    widths = [(missing // 2, missing - missing // 2) for missing in (-side % 14 for side in images.shape[1:3])]
    return np.pad(images, ((0, 0), *widths, (0, 0)))


def finished(depth: Any, size: tuple[int, int], max_depth: float, *, align_corners: bool = False) -> np.ndarray:
    """What upstream does after its heads: cuts off depths outside the range, and resizes to the size of the image."""
    from torch.nn import functional

    depth = depth.clamp(0.001, max_depth)[:, None]
    return functional.interpolate(depth, size, mode="bilinear", align_corners=align_corners)[:, 0].numpy()
