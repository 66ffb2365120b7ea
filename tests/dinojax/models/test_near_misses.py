"""The mistakes that reimplementations made, planted one at a time: the reference arrays expose each of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import from_torch
from dinojax import UserError, VisionTransformer
from dinojax.models import layers, position, vit
from dinojax.models.layers import LayerScale, PatchEmbed
from dinojax.models.norm import LayerNorm
from dinojax.models.position import interpolate_pos_embed
from tests.support.backbone_parity import deviations, load, too_large
from tests.support.reference_files import BUNDLED, read

pytestmark = pytest.mark.near_miss

PLAIN, FAINT, REGISTERS = "dinov2_tiny_plain", "dinov2_tiny_faint", "dinov2_tiny_reg4_antialias"
V1, V1_FAINT, SWIGLU = "dino_v1_tiny", "dino_v1_tiny_faint", "dinov2_tiny_swiglufused"


def tanh_gelu(patch):
    patch.setattr(layers, "gelu", lambda x: jax.nn.gelu(x, approximate=True))


def eps_1e_5(patch):
    patch.setattr(layers, "LayerNorm", lambda *args, **kwargs: LayerNorm(*args, **kwargs | {"epsilon": 1e-5}))
    patch.setattr(vit, "LayerNorm", layers.LayerNorm)


def no_layer_scale(patch):
    patch.setattr(LayerScale, "__call__", lambda self, x: x)


def interpolation(**changes):
    """Another convention in the configuration."""

    def plant(patch):
        original = vit.interpolate_pos_embed
        patch.setattr(vit, "interpolate_pos_embed", lambda *args, **kwargs: original(*args, **kwargs | changes))

    return plant


def kernel(a: float):
    """Another bicubic kernel parameter."""

    def plant(patch):
        cubic = position._cubic
        position.resize_matrix.cache_clear()
        patch.setattr(position, "_cubic", lambda x, **_: cubic(x, a=a))

    return plant


def height_and_width_swapped(patch):
    patch.setattr(
        vit,
        "interpolate_pos_embed",
        lambda table, rows, columns, **kwargs: interpolate_pos_embed(table, columns, rows, **kwargs),
    )


def stored_grid_transposed(patch):
    def transposed(table, rows, columns, **kwargs):
        side = round((table.shape[1] - 1) ** 0.5)
        grid = table[:, 1:].reshape(1, side, side, -1).transpose(0, 2, 1, 3).reshape(1, side * side, -1)
        return interpolate_pos_embed(jnp.concatenate([table[:, :1], grid], 1), rows, columns, **kwargs)

    patch.setattr(vit, "interpolate_pos_embed", transposed)


def shortcut_on_patch_count_alone(patch):
    original = VisionTransformer.interpolated_pos_embed

    def shortcut(self, height, width):
        same = (height // self.config.patch_size) * (width // self.config.patch_size) == self.config.num_patches
        return self.pos_embed[...] if same else original(self, height, width)

    patch.setattr(VisionTransformer, "interpolated_pos_embed", shortcut)


def image_transposed(patch):
    embed = PatchEmbed.__call__
    patch.setattr(PatchEmbed, "__call__", lambda self, images: embed(self, images.transpose(0, 2, 1, 3)))


def masks_ignored(patch):
    embed = VisionTransformer._embed
    patch.setattr(VisionTransformer, "_embed", lambda self, images, masks=None: embed(self, images))


def mask_after_position(patch):
    embed = VisionTransformer._embed

    def late(self, images, masks=None):
        x = embed(self, images)
        if masks is None:
            return x
        covered = jnp.pad(masks, ((0, 0), (x.shape[1] - masks.shape[1], 0)))
        return jnp.where(covered[..., None], self.mask_token[...], x)

    patch.setattr(VisionTransformer, "_embed", late)


def registers_get_positions(patch):
    embed = VisionTransformer._embed

    def shifted(self, images, masks=None):
        x = embed(self, images, masks)
        positions = self.interpolated_pos_embed(*images.shape[1:3])
        registers = 1 + self.config.num_register_tokens
        return x.at[:, 1:registers].add(positions[:, 1:registers])

    patch.setattr(VisionTransformer, "_embed", shifted)


def heads_before_qkv(patch):
    def heads(self, x):
        batch, tokens, dim = x.shape
        return self.qkv(x).reshape(batch, tokens, self.num_heads, 3, dim // self.num_heads).transpose(3, 0, 2, 1, 4)

    patch.setattr(layers.Attention, "_heads", heads)


@pytest.mark.parametrize(
    ("mistake", "name", "group"),
    [
        *[(tanh_gelu, name, "native") for name in (PLAIN, FAINT, REGISTERS, V1)],
        *[(eps_1e_5, name, "native") for name in (FAINT, V1_FAINT)],
        (no_layer_scale, PLAIN, "native"),
        *[(interpolation(offset=0.0), name, "smaller") for name in (PLAIN, V1)],
        *[(interpolation(offset=0.0), PLAIN, group) for group in ("larger", "nonsquare", "samecount")],
        *[(kernel(-0.5), PLAIN, group) for group in ("smaller", "larger", "nonsquare", "samecount")],
        (kernel(-0.75), REGISTERS, "smaller"),
        (interpolation(antialias=True), PLAIN, "smaller"),
        (interpolation(antialias=True, offset=0.0), PLAIN, "smaller"),
        (interpolation(antialias=False), REGISTERS, "smaller"),
        (interpolation(offset=0.1), REGISTERS, "larger"),
        *[(height_and_width_swapped, name, "nonsquare") for name in (PLAIN, REGISTERS, V1, SWIGLU)],
        *[(stored_grid_transposed, name, "smaller") for name in (PLAIN, REGISTERS, V1)],
        *[(shortcut_on_patch_count_alone, name, "samecount") for name in (PLAIN, REGISTERS, V1)],
        *[(image_transposed, name, "native") for name in (PLAIN, V1)],
        (masks_ignored, PLAIN, "native_masked"),
        *[(mask_after_position, name, "native_masked") for name in (PLAIN, REGISTERS)],
        (registers_get_positions, REGISTERS, "native"),
        (heads_before_qkv, V1, "native"),
    ],
)
def test_the_mistake_shows(monkeypatch, mistake, name, group):
    reference = read(name, BUNDLED)
    mistake(monkeypatch)
    try:
        found = deviations(load(reference, np.float32), reference, group)
        assert too_large(found, reference.vit_config().family)
    finally:
        position.resize_matrix.cache_clear()


@pytest.mark.parametrize("tensor", ["mask_token", "norm.bias", "blocks.1.ls2.gamma"])
def test_an_unfilled_tensor_is_refused_by_name(tensor):
    reference = read(PLAIN, BUNDLED)
    state = reference.group("state")
    del state[tensor]
    with pytest.raises(UserError, match=f"missing {tensor}"):
        from_torch(state, num_heads=4)


def test_a_mask_token_is_not_needed_where_the_model_has_none():
    reference = read(V1, BUNDLED)
    config = dataclasses.replace(reference.vit_config(), family="dinov2")
    with pytest.raises(UserError, match="missing mask_token"):
        from_torch(reference.group("state"), config=config)
