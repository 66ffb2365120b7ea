"""The vision transformer of DINO, DINOv2 and DINOv3: its outputs, and the model.

Source: facebookresearch/dino 7c446df `vision_transformer.py`,
facebookresearch/dinov2 b8931f7 `dinov2/models/vision_transformer.py`; for DINOv3 arXiv 2508.10104 and
`modeling_dinov3_vit.py` of Hugging Face's transformers 5.24.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from dinojax.models.config import ViTConfig
from dinojax.models.layers import Block, Module, PatchEmbed
from dinojax.models.norm import LayerNorm
from dinojax.models.position import interpolate_pos_embed
from dinojax.models.preprocessing import Preprocessing
from dinojax.models.rope import Rotation, rotation
from dinojax.precision import at_least_float32

_Batch = Array | np.ndarray
_LARGEST_DEFAULT = 224  # DINOv2's weights were trained at 518 px and evaluated at 224 px


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
    """DINO / DINOv2 / DINOv3 backbone for NHWC images of any size, normalised as the weights expect.

    It computes in the dtype of its parameters, see `astype`. Images that it does not take are refused with a sentence.

    Args:
        config: the architecture.
        rngs: draws the initial values.
        preprocessing: what the weights expect of images, for `dinojax.preprocess`. None takes `default_preprocessing`.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs, preprocessing: Preprocessing | None = None):
        self.config = config
        self.preprocessing = preprocessing or default_preprocessing(config)
        dim, v2, v3 = config.embed_dim, config.family == "dinov2", config.family == "dinov3"
        normal, draw = jax.random.normal, rngs.params
        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, dim, rngs=rngs)
        self.cls_token = nnx.Param((1e-6 if v2 else 0.02) * normal(draw(), (1, 1, dim)))
        self.pos_embed = None if v3 else nnx.Param(0.02 * normal(draw(), (1, 1 + config.num_patches, dim)))
        self.mask_token = nnx.Param(jnp.zeros((1, dim))) if v2 or v3 else None
        registers, spread = config.num_register_tokens, 0.02 if v3 else 1e-6
        self.register_tokens = nnx.Param(spread * normal(draw(), (1, registers, dim))) if registers else None
        self.blocks = nnx.List(
            Block(
                dim,
                config.num_heads,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=config.qkv_bias,
                ffn_layer=config.ffn_layer,
                init_values=config.init_values,
                drop_path_rate=rate,
                key_bias=config.key_bias,
                layer_norm_eps=config.layer_norm_eps,
                rngs=rngs,
            )
            for rate in _drop_path_rates(config)
        )
        self.norm = LayerNorm(dim, epsilon=config.layer_norm_eps, rngs=rngs)

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
            masks: bool "batch patches": which patches the mask token replaces, in row-major order (not for DINO).
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
        x, rotation = self._embed(images, masks), self.rotation(*images.shape[1:3])
        for block, block_key in zip(self.blocks, keys):
            apply = functools.partial(Block.__call__, block, drop_subsets=drop_subsets, drop_order=drop_order)
            x = (jax.checkpoint(apply) if remat else apply)(x, rotation, key=block_key)
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
        x, rotation = self._embed(images), self.rotation(*images.shape[1:3])
        for index, block in enumerate(self.blocks):
            x = block(x, rotation)
            if index in wanted:
                cls_token, _, patches = self._split(self.norm(x) if norm else x)
                patches = patches.reshape(patches.shape[0], rows, columns, -1) if reshape else patches
                outputs.append((patches, cls_token) if return_class_token else patches)
        return tuple(outputs)

    def get_last_selfattention(self, images: Array | np.ndarray) -> Float[Array, "batch heads tokens tokens"]:
        """Attention probabilities of the last block; the tokens are in the order CLS, registers, patches."""
        x, rotation = self._embed(images), self.rotation(*images.shape[1:3])
        for block in list(self.blocks)[:-1]:
            x = block(x, rotation)
        return self.blocks[-1].attention_probs(x, rotation)

    def get_last_keys(self, images: Array | np.ndarray) -> Float[Array, "batch rows columns dim"]:
        """The keys of the last block's attention for each patch, of all heads side by side, without CLS and registers.

        LOST and TokenCut (`dinojax.patches`) take these. DINOv3's are those before the rotation.
        """
        rows, columns = (side // self.config.patch_size for side in images.shape[1:3])
        x, rotation = self._embed(images), self.rotation(*images.shape[1:3])
        for block in list(self.blocks)[:-1]:
            x = block(x, rotation)
        keys = self._split(self.blocks[-1].attention_keys(x))[2]
        return keys.reshape(len(keys), rows, columns, -1)

    def rotation(self, height: int, width: int) -> Rotation | None:
        """The rotation of queries and keys for images of `height` × `width` pixels; None for a model with a table."""
        config, patch = self.config, self.config.patch_size
        if config.rope_base is None:
            return None
        return rotation(
            height // patch,
            width // patch,
            config.embed_dim // config.num_heads,
            unrotated=1 + config.num_register_tokens,
            base=config.rope_base,
            rounded_to=config.rope_periods,
            dtype=at_least_float32(self.cls_token.dtype),
        )

    def interpolated_pos_embed(self, height: int, width: int) -> Float[Array, "1 positions dim"]:
        """The position embedding of images of `height` × `width` pixels, class entry first.

        Raises:
            ValueError: the model has no position table (DINOv3), see `rotation`.
        """
        if self.pos_embed is None:
            raise ValueError("a DINOv3 model has no position table: it rotates queries and keys, see model.rotation")
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
        if self.pos_embed is not None:
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
    """ImageNet's mean and deviation, and the size of the position table, at most 224 px; for RGB images.

    DINOv3's images are resized bilinearly, as `transformers` does (`image_processing_dinov3_vit.py`).
    """
    size, patch = min(config.img_size, _LARGEST_DEFAULT), config.patch_size
    filtered = "bilinear" if config.family == "dinov3" else "bicubic"
    if config.in_chans == 3:
        return Preprocessing(image_size=size, patch_size=patch, interpolation=filtered)
    zeros, ones = (0.0,) * config.in_chans, (1.0,) * config.in_chans
    return Preprocessing(mean=zeros, std=ones, image_size=size, patch_size=patch, interpolation=filtered)


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


def _drop_path_rates(config: ViTConfig) -> list[float]:
    if config.drop_path_uniform:
        return [config.drop_path_rate] * config.depth
    return [float(rate) for rate in np.linspace(0, config.drop_path_rate, config.depth)]
