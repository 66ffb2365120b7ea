"""The vision transformer of DINO and DINOv2: its configuration, its outputs, the model.

Source: facebookresearch/dino 7c446df `vision_transformer.py`,
facebookresearch/dinov2 b8931f7 `dinov2/models/vision_transformer.py`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, Key

from dinojax.errors import require
from dinojax.models.layers import Block, Module, PatchEmbed
from dinojax.models.norm import LayerNorm
from dinojax.models.position import interpolate_pos_embed
from dinojax.models.preprocessing import Preprocessing

_Batch = Array | np.ndarray
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
_LARGEST_DEFAULT = 224  # DINOv2's weights were trained at 518 px and evaluated at 224 px
_REAL = {
    "mlp_ratio": (0.001, 1024),
    "init_values": (-1024, 1024),
    "interpolate_offset": (-1, 1),
    "drop_path_rate": (0, 1),
}


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
        family: "dinov2" models have a mask token and refuse images whose sides the patch size does not divide; "dino"
            models cut off the remaining pixels. None infers it: only DINOv2 has LayerScale, registers or SwiGLU.

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
    family: Literal["dino", "dinov2"] | None = None

    def __post_init__(self):
        _raise_if_damaged(self)
        if self.family is None:
            only_v2 = self.init_values is not None or self.num_register_tokens > 0 or self.ffn_layer != "mlp"
            object.__setattr__(self, "family", "dinov2" if only_v2 else "dino")
        heads, patch = self.num_heads, self.patch_size
        require(self.ffn_layer in ("mlp", "swiglufused"), "ffn_layer", self.ffn_layer, "'mlp' or 'swiglufused'")
        divides = heads > 0 and self.embed_dim % heads == 0
        require(divides, "embed_dim", self.embed_dim, f"a multiple of num_heads={heads}")
        require(0 < patch <= self.img_size, "img_size", self.img_size, f"enough for one patch of patch_size={patch}")

    @property
    def num_patches(self) -> int:
        """Number of patch entries in the position table."""
        return (self.img_size // self.patch_size) ** 2


class Features(NamedTuple):
    """The tokens of a batch of images after the final LayerNorm; `prenorm` holds all of them before it.

    Patches are in row-major order; the tokens of `prenorm` in the order CLS, registers, patches. A model without
    registers has zero `register_tokens`.
    """

    cls_token: Float[Array, "batch dim"]
    patch_tokens: Float[Array, "batch patches dim"]
    register_tokens: Float[Array, "batch registers dim"]
    prenorm: Float[Array, "batch tokens dim"]


class VisionTransformer(Module):
    """DINO / DINOv2 backbone for NHWC images of any size, normalised as the weights expect.

    It computes in the dtype of its parameters, see `astype`. Images that it does not take are refused with a sentence.

    Args:
        config: the architecture.
        rngs: draws the initial values.
        preprocessing: what the weights expect of images, for `dinojax.preprocess`. None takes `default_preprocessing`.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, preprocessing: Preprocessing | None = None):
        self.config = config
        self.preprocessing = preprocessing or default_preprocessing(config)
        dim, v2 = config.embed_dim, config.family == "dinov2"
        normal, draw = jax.random.normal, rngs.params
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, dim, rngs=rngs)
        self.cls_token = nnx.Param((1e-6 if v2 else 0.02) * normal(draw(), (1, 1, dim)))
        self.pos_embed = nnx.Param(0.02 * normal(draw(), (1, 1 + config.num_patches, dim)))
        self.mask_token = nnx.Param(jnp.zeros((1, dim))) if v2 else None
        registers = config.num_register_tokens
        self.register_tokens = nnx.Param(1e-6 * normal(draw(), (1, registers, dim))) if registers else None
        self.blocks = nnx.List(
            Block(
                dim,
                config.num_heads,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=config.qkv_bias,
                ffn_layer=config.ffn_layer,
                init_values=config.init_values,
                drop_path_rate=rate,
                rngs=rngs,
            )
            for rate in _drop_path_rates(config)
        )
        self.norm = LayerNorm(dim, rngs=rngs)

    def __call__(
        self,
        images: Array | np.ndarray,
        masks: Array | np.ndarray | None = None,
        *,
        key: Key[Array, ""] | None = None,
        drop_subsets: bool = False,
        drop_order: Int[np.ndarray, " batch"] | None = None,
        remat: bool = False,
    ) -> Features:
        """Features of a batch of images.

        Args:
            images: normalised pixels "batch height width channels".
            masks: bool "batch patches": which patches the mask token replaces, in row-major order (DINOv2 only).
            key: draws drop path; None leaves it out.
            drop_subsets: drop path as DINOv2 trains: each branch is computed for a random subset of the images only.
            drop_order: the place of each image in the order in which drop path is drawn; None takes them as they come.
                With it, all images are computed in each branch, those that `drop_subsets` leaves out too, so that the
                batch may be divided among devices.
            remat: keep only the input of each block, and compute its activations again for the gradient.

        Raises:
            ValueError: images of integers, of another shape, smaller than a patch, or of a size that a DINOv2 model
                does not take; masks of another type or shape, or for a model without a mask token.
        """
        keys = [None] * len(self.blocks) if key is None else list(jax.random.split(key, len(self.blocks)))
        x = self._embed(images, masks)
        for block, block_key in zip(self.blocks, keys):
            apply = functools.partial(Block.__call__, block, drop_subsets=drop_subsets, drop_order=drop_order)
            x = (jax.checkpoint(apply) if remat else apply)(x, key=block_key)
        cls_token, register_tokens, patch_tokens = self._split(self.norm(x))
        return Features(cls_token, patch_tokens, register_tokens, prenorm=x)

    def get_intermediate_layers(
        self,
        images: Array | np.ndarray,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple:
        """Patch tokens after chosen blocks, with DINOv2's meaning for every model.

        Args:
            images: normalised pixels "batch height width channels".
            n: number of last blocks, or the indices of blocks.
            reshape: return maps "batch rows columns dim" instead of "batch patches dim".
            return_class_token: return pairs of patch tokens and class token "batch dim".
            norm: apply the final LayerNorm to the output of each block.

        Returns:
            One entry per block, in the order of the blocks. The patch tokens exclude CLS and registers.

        Raises:
            ValueError: a block that the model does not have, or images of a size that it does not take.
        """
        wanted = self._block_indices(n)
        _raise_unless_images(images, self.config)
        rows, columns = (side // self.config.patch_size for side in images.shape[1:3])
        outputs = []
        x = self._embed(images)
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in wanted:
                cls_token, _, patches = self._split(self.norm(x) if norm else x)
                patches = patches.reshape(patches.shape[0], rows, columns, -1) if reshape else patches
                outputs.append((patches, cls_token) if return_class_token else patches)
        return tuple(outputs)

    def get_last_selfattention(self, images: Array | np.ndarray) -> Float[Array, "batch heads tokens tokens"]:
        """Attention probabilities of the last block; the tokens are in the order CLS, registers, patches."""
        x = self._embed(images)
        for block in list(self.blocks)[:-1]:
            x = block(x)
        return self.blocks[-1].attention_probs(x)

    def get_last_keys(self, images: Array | np.ndarray) -> Float[Array, "batch rows columns dim"]:
        """The keys of the last block's attention for each patch, of all heads side by side, without CLS and registers.

        LOST and TokenCut (`dinojax.patches`) take these.
        """
        rows, columns = (side // self.config.patch_size for side in images.shape[1:3])
        x = self._embed(images)
        for block in list(self.blocks)[:-1]:
            x = block(x)
        keys = self._split(self.blocks[-1].attention_keys(x))[2]
        return keys.reshape(len(keys), rows, columns, -1)

    def astype(self, dtype: DTypeLike) -> "VisionTransformer":
        """A copy with parameters of another dtype, in which it computes; jnp.bfloat16 suits GPUs and TPUs."""
        graphdef, state = nnx.split(self)
        return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), state))

    def interpolated_pos_embed(self, height: int, width: int) -> Float[Array, "1 positions dim"]:
        """The position embedding of images of `height` × `width` pixels, class entry first."""
        rows, columns = height // self.config.patch_size, width // self.config.patch_size
        pos_embed = self.pos_embed[...]
        if rows * columns == self.config.num_patches and height == width:
            return pos_embed
        return interpolate_pos_embed(
            pos_embed,
            rows,
            columns,
            antialias=self.config.interpolate_antialias,
            offset=self.config.interpolate_offset,
        )

    def _embed(self, images: _Batch, masks: _Batch | None = None) -> Array:
        """Embeds patches, replaces masked ones, puts CLS in front, adds positions, and inserts the registers."""
        _raise_unless_images(images, self.config)
        x = self.patch_embed(images)
        if masks is not None:
            if self.mask_token is None:
                raise ValueError("masks were given to a DINO (v1) model, which has no mask token")
            if masks.shape != x.shape[:2] or masks.dtype != bool:
                raise ValueError(
                    f"masks are {masks.dtype} of shape {tuple(masks.shape)}; expected is bool of shape "
                    f"{tuple(x.shape[:2])}, one for each image and patch"
                )
            x = jnp.where(masks[..., None], self.mask_token[...].astype(x.dtype), x)
        batch, _, dim = x.shape
        x = jnp.concatenate([jnp.broadcast_to(self.cls_token[...], (batch, 1, dim)), x], axis=1)
        x = x + self.interpolated_pos_embed(*images.shape[1:3])
        if self.register_tokens is None:
            return x
        registers = jnp.broadcast_to(self.register_tokens[...], (batch, self.config.num_register_tokens, dim))
        return jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)

    def _block_indices(self, n: int | Sequence[int]) -> set[int]:
        depth = len(self.blocks)
        wanted = set(range(depth - n, depth)) if isinstance(n, int) else set(n)
        if not wanted or not wanted <= set(range(depth)):
            raise ValueError(f"n={n!r} does not name blocks of a model with {depth} blocks (0 to {depth - 1})")
        return wanted

    def _split(self, x: Array) -> tuple[Array, Array, Array]:
        """Class token, register tokens, patch tokens."""
        first_patch = 1 + self.config.num_register_tokens
        return x[:, 0], x[:, 1:first_patch], x[:, first_patch:]


def default_preprocessing(config: ViTConfig) -> Preprocessing:
    """ImageNet's mean and deviation, and the size of the position table, at most 224 px; for RGB images."""
    size, patch = min(config.img_size, _LARGEST_DEFAULT), config.patch_size
    if config.in_chans == 3:
        return Preprocessing(image_size=size, patch_size=patch)
    zeros, ones = (0.0,) * config.in_chans, (1.0,) * config.in_chans
    return Preprocessing(mean=zeros, std=ones, image_size=size, patch_size=patch)


def _raise_unless_images(images: _Batch, config: ViTConfig) -> None:
    """Raises a `ValueError` that says what was given and what to do."""
    shape, channels, patch = images.shape, config.in_chans, config.patch_size
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images of {images.dtype} are not normalised: dinojax.preprocess(photos, model) prepares photos, and "
            "dinojax.normalize(images, model) arrays"
        )
    if len(shape) != 4:
        hint = "images[None] adds the batch axis" if len(shape) == 3 else "pass batch, height, width, channels"
        raise ValueError(f"images of shape {shape} do not have four axes; {hint}")
    if shape[0] == 0:
        raise ValueError(f"the batch is empty: images of shape {shape}; pass one image or more")
    if shape[3] != channels:
        hint = "images.transpose(0, 2, 3, 1) moves them to the end" if shape[1] == channels else "RGB has 3"
        raise ValueError(f"images of shape {shape} do not end with the {channels} channels of the model; {hint}")
    height, width = shape[1:3]
    if min(height, width) < patch:
        raise ValueError(f"images of {height}×{width} px are smaller than one patch of {patch} px")
    if config.family == "dinov2" and (height % patch or width % patch):
        raise ValueError(
            f"images of {height}×{width} px are not a multiple of the patch size {patch}; resize them, "
            f"for example to {round(height / patch) * patch}×{round(width / patch) * patch}"
        )


def _raise_if_damaged(config: ViTConfig) -> None:
    """Refuses values of other types, and numbers that no model comes near."""
    for name, (least, most) in (_WHOLE | _REAL).items():
        value, kinds = getattr(config, name), int if name in _WHOLE else int | float
        holds = isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most
        wanted = f"a {'whole ' if name in _WHOLE else ''}number from {least} to {most}"
        require(holds or (name == "init_values" and value is None), name, value, wanted)
    for name in ("qkv_bias", "interpolate_antialias", "drop_path_uniform"):
        require(isinstance(getattr(config, name), bool), name, getattr(config, name), "True or False")
    require(config.family in (None, "dino", "dinov2"), "family", config.family, "'dino', 'dinov2' or None")


def _drop_path_rates(config: ViTConfig) -> list[float]:
    if config.drop_path_uniform:
        return [config.drop_path_rate] * config.depth
    return [float(rate) for rate in np.linspace(0, config.drop_path_rate, config.depth)]
