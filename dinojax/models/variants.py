"""The published models as data: torch.hub name → `ViTConfig`.

Source: facebookresearch/dino 7c446df `hubconf.py`, facebookresearch/dinov2 b8931f7 `dinov2/hub/backbones.py`. The
ViT-Tiny entries are upstream's `vit_tiny`, for which no weights were published. `dinojax_vitt` is this project's own
model, whose weights are in the package (`dinojax/assets`).
"""

from types import MappingProxyType
from typing import Any

from dinojax.models.vit import ViTConfig

_WIDTHS: dict[str, dict[str, Any]] = {
    "t": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "g": {"embed_dim": 1536, "depth": 40, "num_heads": 24, "ffn_layer": "swiglufused"},
}


def _dinov2(size: str, *, registers: bool) -> ViTConfig:
    interpolation: dict[str, Any] = {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}
    return ViTConfig(
        img_size=518, patch_size=14, init_values=1.0, **_WIDTHS[size], **(interpolation if registers else {})
    )


VARIANTS: MappingProxyType[str, ViTConfig] = MappingProxyType(
    {f"dino_vit{size}{patch}": ViTConfig(patch_size=patch, **_WIDTHS[size]) for size in "tsb" for patch in (16, 8)}
    | {f"dinov2_vit{size}14": _dinov2(size, registers=False) for size in "sblg"}
    | {f"dinov2_vit{size}14_reg": _dinov2(size, registers=True) for size in "sblg"}
    | {"dinojax_vitt": ViTConfig(img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4)}
)
