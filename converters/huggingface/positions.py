"""How a model resizes its position table to images of another size: as upstream's code, or as `transformers`.

Upstream's DINO and plain DINOv2 resize by a factor that is 0.1 patch larger (`torch.hub`); `transformers` resizes them
to the exact size. Models with registers are resized with smoothing and to the exact size by both. At the size of the
table there is no difference.

DINOv3 has no table but a rotation with periods. Meta's own files hold them rounded to bfloat16, `transformers` computes
them in float32. "hub" takes what a file holds, "huggingface" float32.
"""

import dataclasses
from typing import Literal

from dinojax.errors import require
from dinojax.models.config import ViTConfig

Positions = Literal["hub", "huggingface"]
_CHOICES = ("hub", "huggingface")
_UPSTREAM_OFFSET = 0.1


def with_positions(config: ViTConfig, positions: str) -> ViTConfig:
    """The same architecture with a convention.

    Args:
        config: of any model.
        positions: "hub" for that of upstream's code, "huggingface" for that of `transformers`.

    Raises:
        UserError: another word.
    """
    require(positions in _CHOICES, "positions", positions, " or ".join(map(repr, _CHOICES)))
    if config.family == "dinov3":
        return dataclasses.replace(config, rope_periods="float32") if positions == "huggingface" else config
    smoothed = config.num_register_tokens > 0
    offset = _UPSTREAM_OFFSET if positions == "hub" and not smoothed else 0.0
    return dataclasses.replace(config, interpolate_antialias=smoothed, interpolate_offset=offset)


def difference_from_transformers(config: ViTConfig) -> str | None:
    """One sentence if `transformers` computes positions of this model in another way; None if not."""
    if with_positions(config, "huggingface") == config:
        return None
    if config.family == "dinov3":
        return (
            "periods of the rotation are rounded to bfloat16, as the file holds them; transformers does not round, "
            "and its outputs differ from about the third decimal on"
        )
    return (
        f"positions are resized as in upstream's code, with its +0.1; transformers resizes without it, and at other "
        f"sizes than {config.img_size} px its outputs differ by about 1e-2"
    )
