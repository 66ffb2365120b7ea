"""The linear depth head: each pixel is a mixture of 256 depths.

Source: facebookresearch/dinov2 b8931f7 `dinov2/hub/depthers.py`, `dinov2/hub/depth/decode_heads.py` (`BNHead`).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dinojax.errors import require
from dinojax.heads.resize import resize_bilinear
from dinojax.models.layers import Module
from dinojax.precision import at_least_float32

Layers = Sequence[tuple[Float[Array, "batch rows columns dim"], Float[Array, "batch dim"]]]
_LEAST_WEIGHT = 0.1


@dataclasses.dataclass(frozen=True)
class LinearDepthConfig:
    """What a `LinearDepthHead` is built from.

    Attributes:
        embed_dim: width of the backbone.
        blocks: indices of the blocks whose tokens are joined.
        min_depth: depth of the first bin in metres.
        max_depth: depth of the last bin in metres.
        bins: number of depths, evenly spaced.
        upsample: how many times finer than the patches the depth map is.

    Raises:
        UserError: depths that are not in order, or a number that is not positive.
    """

    embed_dim: int
    blocks: Sequence[int]
    min_depth: float = 0.001
    max_depth: float = 10.0
    bins: int = 256
    upsample: int = 4

    def __post_init__(self):
        for name in ("embed_dim", "bins", "upsample"):
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        require(len(self.blocks) > 0, "blocks", self.blocks, "one block or more")
        require(0 < self.min_depth < self.max_depth, "max_depth", self.max_depth, f"above {self.min_depth} m")
        object.__setattr__(self, "blocks", tuple(self.blocks))


class LinearDepthHead(Module):
    """Weights of depths from the patch and class tokens of some blocks, before the final LayerNorm.

    Each pixel sees the patch and class tokens of every block. A linear layer gives it one number for each bin; the
    negative ones become 0, each is raised by 0.1, and all are scaled to the sum 1. The depth is the mean of the bins
    with these weights.

    Args:
        config: blocks and depths.
        rngs: draws the initial values.
    """

    def __init__(self, config: LinearDepthConfig, *, rngs: nnx.Rngs):
        self.config = config
        inputs = 2 * config.embed_dim * len(config.blocks)
        self.conv_depth = nnx.Conv(inputs, config.bins, (1, 1), rngs=rngs)

    def __call__(self, layers: Layers) -> Float[Array, "batch fine_rows fine_columns"]:
        """Depth in metres from maps of patch tokens and class tokens, one pair for each block."""
        rows, columns = layers[0][0].shape[1:3]
        size = (self.config.upsample * rows, self.config.upsample * columns)
        logits = resize_bilinear(self.logits(layers), size, align_corners=False)
        logits = logits.astype(at_least_float32(logits.dtype))
        weights = jax.nn.relu(logits) + _LEAST_WEIGHT
        depths = jnp.linspace(self.config.min_depth, self.config.max_depth, self.config.bins, dtype=logits.dtype)
        return jnp.einsum("brck,k->brc", weights, depths, precision="highest") / weights.sum(-1)

    def logits(self, layers: Layers) -> Float[Array, "batch rows columns bins"]:
        """A number for each bin and patch.

        Upstream resizes the tokens, and multiplies then. A linear layer and a bilinear resizing may change places: this
        way around, both take a sixteenth of the work. The class tokens, equal in all pixels, are multiplied once.
        """
        assert self.conv_depth.bias is not None
        kernel = self.conv_depth.kernel[...][0, 0]
        of_patches, of_cls = jnp.split(kernel.reshape(len(layers), 2, -1, kernel.shape[-1]), 2, axis=1)
        patches = jnp.concatenate([tokens for tokens, _ in layers], axis=-1)
        cls_tokens = jnp.concatenate([token for _, token in layers], axis=-1)
        flat = patches.reshape(-1, patches.shape[-1]) @ of_patches.reshape(-1, kernel.shape[-1])
        constant = cls_tokens @ of_cls.reshape(-1, kernel.shape[-1]) + self.conv_depth.bias[...][None]
        return flat.reshape(*patches.shape[:3], -1) + constant[:, None, None]
