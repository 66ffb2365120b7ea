"""The published models as data: torch.hub name → `ViTConfig`.

Source: facebookresearch/dino 7c446df `hubconf.py`, facebookresearch/dinov2 b8931f7 `dinov2/hub/backbones.py`; for
DINOv3 arXiv 2508.10104 and the settings of facebook/dinov3-… at Hugging Face. The ViT-Tiny entries are upstream's
`vit_tiny`, for which no weights were published. `dinojax_vitt` is this project's own model, whose weights are in the
package (`dinojax/assets`).
"""

from types import MappingProxyType
from typing import Any

from dinojax.models.config import ViTConfig

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


_GATED = {"ffn_layer": "swiglufused", "mlp_ratio": 6.0}
_DINOV3: dict[str, dict[str, Any]] = {
    "vits16": _WIDTHS["s"],
    "vits16plus": _WIDTHS["s"] | _GATED,
    "vitb16": _WIDTHS["b"],
    "vitl16": _WIDTHS["l"],
    "vith16plus": {"embed_dim": 1280, "depth": 32, "num_heads": 20} | _GATED,
    "vit7b16": {"embed_dim": 4096, "depth": 40, "num_heads": 32} | _GATED | {"mlp_ratio": 3.0, "qkv_bias": False},
}


def _dinov3(size: str) -> ViTConfig:
    fixed: dict[str, Any] = {"num_register_tokens": 4, "layer_norm_eps": 1e-5, "key_bias": False, "rope_base": 100.0}
    return ViTConfig(patch_size=16, init_values=1.0, **fixed, **_DINOV3[size])


_SATELLITE = "sat493m"  # 493 million images of Maxar satellites
SATELLITE_MEAN = (0.430, 0.411, 0.296)
SATELLITE_STD = (0.213, 0.156, 0.143)
"""Mean and deviation of the pixels of the satellite models; their `preprocessor_config.json` has them."""


VARIANTS: MappingProxyType[str, ViTConfig] = MappingProxyType(
    {f"dino_vit{size}{patch}": ViTConfig(patch_size=patch, **_WIDTHS[size]) for size in "tsb" for patch in (16, 8)}
    | {f"dinov2_vit{size}14": _dinov2(size, registers=False) for size in "sblg"}
    | {f"dinov2_vit{size}14_reg": _dinov2(size, registers=True) for size in "sblg"}
    | {f"dinov3_{size}": _dinov3(size) for size in _DINOV3}
    | {f"dinov3_{size}_{_SATELLITE}": _dinov3(size) for size in ("vitl16", "vit7b16")}
    | {"dinojax_vitt": ViTConfig(img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4)}
)


def is_satellite(name: str) -> bool:
    """Whether the name of a model, or of a published file or folder, is that of a satellite model."""
    return _SATELLITE in name
