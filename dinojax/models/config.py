"""What a vision transformer is built from, in upstream's constructor words; every value is checked."""

import dataclasses
from typing import Any, Literal

from dinojax.errors import require
from dinojax.models.rope import Periods

# Bounds that no model comes near: what is beyond them is a damaged file or a slip.
_WHOLE = {
    "img_size": (1, 2**16),
    "patch_size": (1, 2**12),
    "embed_dim": (1, 2**16),
    "depth": (1, 2**10),
    "num_heads": (1, 2**12),
    "num_register_tokens": (0, 2**12),
    "in_chans": (1, 2**12),
}
_REAL = {
    "mlp_ratio": (0.001, 1024),
    "init_values": (-1024, 1024),
    "interpolate_offset": (-1, 1),
    "drop_path_rate": (0, 1),
    "layer_norm_eps": (0, 1),
    "rope_base": (1.001, 2**32),
}
_LATER = ("layer_norm_eps", "key_bias", "rope_base", "rope_periods")
_FAMILIES = ("dino", "dinov2", "dinov3")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """What a `VisionTransformer` is built from, in upstream's constructor words.

    Sizes are in pixels; `img_size` is the size the position table was trained at, and images of any other size may be
    passed to the model. The defaults are DINO ViT-S/16.

    Attributes:
        ffn_layer: "mlp", or "swiglufused" as in DINOv2 ViT-g.
        init_values: initial LayerScale factor; None leaves LayerScale out.
        interpolate_antialias: whether resizing the position table smooths it, see `dinojax.models.position`.
        interpolate_offset: what resizing adds to the number of rows and columns, see `dinojax.models.position`.
        drop_path_rate: rate of the last block; it grows linearly from 0 in the first, unless `drop_path_uniform`.
        family: "dinov2" and "dinov3" models have a mask token. "dinov2" models refuse images whose sides the patch size
            does not divide; "dino" and "dinov3" models cut off the remaining pixels. None infers it: models with
            `rope_base` are "dinov3", and of the others only DINOv2 has LayerScale, registers or SwiGLU.
        layer_norm_eps: what every LayerNorm adds to the variance: 1e-6 in DINO and DINOv2, 1e-5 in DINOv3.
        key_bias: whether a `qkv_bias` covers the keys; DINOv3's has queries and values alone.
        rope_base: largest period of the rotary position embedding, which replaces the position table in DINOv3
            (`dinojax.models.rope`): 100 in all published models. `img_size` is then only the usual size of images.
        rope_periods: what the periods are rounded to: "float32", as `transformers` computes them, or "bfloat16", as
            Meta's own files store them.

    Raises:
        UserError: a value of another type or out of all bounds, sizes that do not fit each other, or an unknown
            `ffn_layer`.
    """

    img_size: int = 224
    patch_size: int = 16
    embed_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4
    qkv_bias: bool = True
    ffn_layer: str = "mlp"
    init_values: float | None = None
    num_register_tokens: int = 0
    interpolate_antialias: bool = False
    interpolate_offset: float = 0.1
    drop_path_rate: float = 0.0
    drop_path_uniform: bool = False
    in_chans: int = 3
    family: Literal["dino", "dinov2", "dinov3"] | None = None
    layer_norm_eps: float = 1e-6
    key_bias: bool = True
    rope_base: float | None = None
    rope_periods: Periods = "float32"

    def __post_init__(self):
        _raise_if_damaged(self)
        if self.family is None:
            only_v2 = self.init_values is not None or self.num_register_tokens > 0 or self.ffn_layer != "mlp"
            family = "dinov3" if self.rope_base is not None else "dinov2" if only_v2 else "dino"
            object.__setattr__(self, "family", family)
        heads, patch = self.num_heads, self.patch_size
        require(self.ffn_layer in ("mlp", "swiglufused"), "ffn_layer", self.ffn_layer, "'mlp' or 'swiglufused'")
        divides = heads > 0 and self.embed_dim % heads == 0
        require(divides, "embed_dim", self.embed_dim, f"a multiple of num_heads={heads}")
        rotated, wanted = self.family == "dinov3", "a number for the family 'dinov3' and None for others"
        require(rotated == (self.rope_base is not None), "rope_base", self.rope_base, wanted)
        pairs = not rotated or self.embed_dim // heads % 4 == 0
        require(pairs, "embed_dim", self.embed_dim, f"4 or a multiple of it for each of num_heads={heads} heads")
        require(0 < patch <= self.img_size, "img_size", self.img_size, f"enough for one patch of patch_size={patch}")

    def settings(self) -> dict[str, Any]:
        """The fields by name, for files and hashes: `ViTConfig(**settings)` is equal.

        Those of later releases are left out where they have their defaults, so that files and hashes of older models
        stay as they were.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in _LATER}
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in defaults or value != defaults[name]
        }

    @property
    def num_patches(self) -> int:
        """Number of patch entries in the position table."""
        return (self.img_size // self.patch_size) ** 2


def _raise_if_damaged(config: ViTConfig) -> None:
    """Refuses values of other types, and numbers that no model comes near."""
    for name, (least, most) in (_WHOLE | _REAL).items():
        value, kinds = getattr(config, name), int if name in _WHOLE else int | float
        holds = isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most
        wanted = f"a {'whole ' if name in _WHOLE else ''}number from {least} to {most}"
        require(holds or (name in ("init_values", "rope_base") and value is None), name, value, wanted)
    for name in ("qkv_bias", "key_bias", "interpolate_antialias", "drop_path_uniform"):
        require(isinstance(getattr(config, name), bool), name, getattr(config, name), "True or False")
    require(config.family in (None, *_FAMILIES), "family", config.family, f"None or one of {_FAMILIES}")
    require(config.rope_periods in ("float32", "bfloat16"), "rope_periods", config.rope_periods, "float32 or bfloat16")
