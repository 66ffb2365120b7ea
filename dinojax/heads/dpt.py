"""The DPT depth head: maps at four scales, fused from coarse to fine by convolutions.

Source: facebookresearch/dinov2 b8931f7 `dinov2/hub/depthers.py`, `dinov2/hub/depth/decode_heads.py` (`DPTHead`);
arXiv 2103.13413.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dinojax.errors import require
from dinojax.heads.linear_depth import Layers
from dinojax.heads.resize import resize_bilinear
from dinojax.models.layers import Linear, Module, gelu, torch_default_init
from dinojax.precision import at_least_float32

Map = Float[Array, "batch _rows _columns _channels"]
_SCALES = 4
_LAST_CHANNELS = 32


@dataclasses.dataclass(frozen=True)
class DPTConfig:
    """What a `DPTHead` is built from.

    Attributes:
        embed_dim: width of the backbone, a multiple of 8.
        blocks: indices of four blocks, the first for the finest map.
        min_depth: least depth in metres.
        max_depth: largest depth in metres, which cuts off what is beyond.
        channels: number of channels of all maps when they are fused.

    Raises:
        UserError: depths that are not in order, another number of blocks, or widths that cannot be halved.
    """

    embed_dim: int
    blocks: Sequence[int]
    min_depth: float = 0.001
    max_depth: float = 10.0
    channels: int = 256

    def __post_init__(self):
        whole = self.embed_dim > 0 and self.embed_dim % 2 ** (_SCALES - 1) == 0
        require(whole, "embed_dim", self.embed_dim, f"a multiple of {2 ** (_SCALES - 1)}")
        require(self.channels > 0 and self.channels % 2 == 0, "channels", self.channels, "positive and even")
        require(len(self.blocks) == _SCALES, "blocks", self.blocks, f"of length {_SCALES}")
        require(0 < self.min_depth < self.max_depth, "max_depth", self.max_depth, f"above {self.min_depth} m")
        object.__setattr__(self, "blocks", tuple(self.blocks))

    @property
    def widths(self) -> list[int]:
        """Channels of the maps from fine to coarse."""
        return [self.embed_dim // 2 ** (_SCALES - 1 - scale) for scale in range(_SCALES)]


class DPTHead(Module):
    """Depth from the patch and class tokens of four blocks, before the final LayerNorm.

    Each block gives a map, with patches cut into 4×4 and 2×2, as they are, and halved. The maps are fused from the
    coarsest to the finest; the result is eight times finer than the patches, and then doubled.

    Args:
        config: blocks, widths and depths.
        rngs: draws the initial values.
    """

    def __init__(self, config: DPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.channels
        self.reassemble_blocks = ReassembleBlocks(config.embed_dim, config.widths, rngs=rngs)
        self.convs = nnx.List(Conv(width, channels, 3, use_bias=False, rngs=rngs) for width in config.widths)
        self.fusion_blocks = nnx.List(
            FeatureFusionBlock(channels, two_inputs=scale > 0, rngs=rngs) for scale in range(_SCALES)
        )
        self.project = Conv(channels, channels, 3, rngs=rngs)
        self.conv_depth = HeadDepth(channels, rngs=rngs)

    def __call__(self, layers: Layers) -> Float[Array, "batch fine_rows fine_columns"]:
        """Depth in metres from maps of patch tokens and class tokens, one pair for each block."""
        maps = [conv(x) for conv, x in zip(self.convs, self.reassemble_blocks(layers))]
        fused = self.fusion_blocks[0](maps[-1])
        for block, x in zip(list(self.fusion_blocks)[1:], maps[-2::-1]):
            fused = block(fused, x)
        depth = self.conv_depth(jax.nn.relu(self.project(fused)))
        return jax.nn.relu(depth.astype(at_least_float32(depth.dtype))) + self.config.min_depth


class Conv(Module):
    """A convolution that keeps the size, under the name that upstream's wrapper gives it."""

    def __init__(self, inputs: int, outputs: int, size: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        self.conv = nnx.Conv(inputs, outputs, (size, size), padding=size // 2, use_bias=use_bias, rngs=rngs)

    def __call__(self, x: Map) -> Map:
        return self.conv(x)


class Upsample(Module):
    """A transposed convolution whose stride is its size: every pixel becomes `factor` × `factor` pixels."""

    def __init__(self, channels: int, factor: int, *, rngs: nnx.Rngs):
        init = torch_default_init(channels * factor**2)
        self.factor = factor
        # torch's layout is inputs, outputs, rows, columns; this is the order that a convolution's kernel has from it.
        self.kernel = nnx.Param(init(rngs.params(), (factor, factor, channels, channels)))
        self.bias = nnx.Param(init(rngs.params(), (channels,)))

    def __call__(self, x: Map) -> Map:
        batch, rows, columns, channels = x.shape
        factor, kernel = self.factor, self.kernel[...]
        pixels = jnp.einsum("brci,uvoi->brucvo", x, kernel) + self.bias[...][None, None, None, None, None]
        return pixels.reshape(batch, factor * rows, factor * columns, channels)


class ReassembleBlocks(Module):
    """Joins the class token to every patch, and makes maps of four scales of the patches."""

    def __init__(self, embed_dim: int, widths: Sequence[int], *, rngs: nnx.Rngs):
        self.projects = nnx.List(Conv(embed_dim, width, 1, rngs=rngs) for width in widths)
        self.resize_layers = nnx.Dict(
            {
                "0": Upsample(widths[0], 4, rngs=rngs),
                "1": Upsample(widths[1], 2, rngs=rngs),
                "3": nnx.Conv(widths[3], widths[3], (3, 3), strides=2, padding=1, rngs=rngs),
            }
        )
        self.readout_projects = nnx.List(nnx.Dict({"0": Linear(2 * embed_dim, embed_dim, rngs=rngs)}) for _ in widths)

    def __call__(self, layers: Layers) -> list[Map]:
        """Maps from fine to coarse."""
        return [self._reassembled(scale, *tokens) for scale, tokens in enumerate(layers)]

    def _reassembled(self, scale: int, patches: Map, cls_token: Float[Array, "batch dim"]) -> Map:
        readout = self.readout_projects[scale]["0"]
        assert readout.bias is not None
        # The product with the class token is the same for every patch.
        of_patches, of_cls = jnp.split(readout.kernel[...], 2)
        flat = (patches.reshape(-1, patches.shape[-1]) @ of_patches).reshape(patches.shape)
        x = gelu(flat + (cls_token @ of_cls + readout.bias[...][None])[:, None, None])
        x = self.projects[scale](x)
        name = str(scale)
        return self.resize_layers[name](x) if name in self.resize_layers else x


class PreActResidualConvUnit(Module):
    """x plus two convolutions, each after a ReLU."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv1 = Conv(channels, channels, 3, use_bias=False, rngs=rngs)
        self.conv2 = Conv(channels, channels, 3, use_bias=False, rngs=rngs)

    def __call__(self, x: Map) -> Map:
        return x + self.conv2(jax.nn.relu(self.conv1(jax.nn.relu(x))))


class FeatureFusionBlock(Module):
    """Adds a finer map to a coarser one that has its size, and doubles the size."""

    def __init__(self, channels: int, *, two_inputs: bool, rngs: nnx.Rngs):
        self.project = Conv(channels, channels, 1, rngs=rngs)
        self.res_conv_unit1 = PreActResidualConvUnit(channels, rngs=rngs) if two_inputs else None
        self.res_conv_unit2 = PreActResidualConvUnit(channels, rngs=rngs)

    def __call__(self, x: Map, finer: Map | None = None) -> Map:
        if finer is not None:
            assert self.res_conv_unit1 is not None
            rows, columns = x.shape[1:3]  # one more than in `finer` where a side was halved and rounded up
            x = x + self.res_conv_unit1(resize_bilinear(finer, (rows, columns), align_corners=False))
        # A 1 × 1 convolution and a bilinear resizing may change places: this way around, the product is a quarter.
        return _doubled(self.project(self.res_conv_unit2(x)))


class HeadDepth(Module):
    """The last layers: 3 × 3, twice the size, 3 × 3, ReLU, 1 × 1."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.head = nnx.Dict(
            {
                "0": nnx.Conv(channels, channels // 2, (3, 3), padding=1, rngs=rngs),
                "2": nnx.Conv(channels // 2, _LAST_CHANNELS, (3, 3), padding=1, rngs=rngs),
                "4": nnx.Conv(_LAST_CHANNELS, 1, (1, 1), rngs=rngs),
            }
        )

    def __call__(self, x: Map) -> Float[Array, "batch new_rows new_columns"]:
        x = _doubled(self.head["0"](x))
        return self.head["4"](jax.nn.relu(self.head["2"](x)))[..., 0]


def _doubled(x: Array) -> Array:
    return resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=True)
