"""Mistakes in DINOv3 that are easily made, planted one at a time: the reference arrays expose each of them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from converters import from_torch
from dinojax import VisionTransformer
from dinojax.models import layers, rope, vit
from tests.support.backbone_parity import deviations, load, too_large
from tests.support.reference_files import BUNDLED, read

pytestmark = pytest.mark.near_miss

PLAIN, SWIGLU, FAINT = "dinov3_tiny", "dinov3_tiny_swiglu64", "dinov3_tiny_faint"


def rotation_of_registers(patch):
    """The rotation starts behind the class token, and the last patches get none."""
    original = vit.rotation

    def shifted(rows, columns, head_dim, *, unrotated, **options):
        found = original(rows, columns, head_dim, unrotated=1, **options)
        cos = jnp.pad(found.cos, ((0, unrotated - 1), (0, 0)), constant_values=1)
        sin = jnp.pad(found.sin, ((0, unrotated - 1), (0, 0)))
        return rope.Rotation(jnp.asarray(cos), jnp.asarray(sin))

    patch.setattr(vit, "rotation", shifted)


def centers(of):
    """Other coordinates of `count` patches on an axis."""
    return lambda patch: patch.setattr(rope, "_centers", of)


def one_normalisation_for_both_axes(patch):
    """Coordinates are divided by the longer axis."""

    def angles(rows, columns, head_dim, base, rounded_to):
        longer = max(rows, columns)
        y, x = ((2 * np.arange(count) + 1 - count) / longer for count in (rows, columns))
        turns = np.stack(np.meshgrid(y, x, indexing="ij"), -1)[..., None] / rope.periods(head_dim, base)
        return 2 * np.pi * turns.reshape(rows * columns, -1)

    patch.setattr(rope, "_angles", angles)


def columns_before_rows(patch):
    angles = rope._angles

    def swapped(rows, columns, head_dim, *settings):
        by_row, by_column = np.split(angles(rows, columns, head_dim, *settings), 2, axis=1)
        return np.concatenate([by_column, by_row], axis=1)

    patch.setattr(rope, "_angles", swapped)


def interleaved_pairs(patch):
    """Channel 2i forms a pair with channel 2i + 1, instead of channel i with channel i + half."""

    def rotate(x, by):
        half = x.shape[-1] // 2
        order = np.arange(x.shape[-1]).reshape(half, 2).T.reshape(-1)
        apart = rope.rotate(x[..., order], by)
        return apart[..., np.argsort(order)]

    patch.setattr(layers, "rotate", rotate)


def turned_the_other_way_for_keys(patch):
    """Queries and keys are turned against each other."""
    calls = []

    def rotate(x, by):
        calls.append(x)
        return rope.rotate(x, by if len(calls) % 2 else rope.Rotation(by.cos, -by.sin))

    patch.setattr(layers, "rotate", rotate)


def periods(**changes):
    """Another base, or periods that are rounded."""

    def plant(patch):
        original = vit.rotation
        patch.setattr(vit, "rotation", lambda *args, **kwargs: original(*args, **kwargs | changes))

    return plant


def registers_behind_the_patches(patch):
    embed = VisionTransformer._embed

    def moved(self, images, masks=None):
        x = embed(self, images, masks)
        first_patch = 1 + self.config.num_register_tokens
        return jnp.concatenate([x[:, :1], x[:, first_patch:], x[:, 1:first_patch]], axis=1)

    patch.setattr(VisionTransformer, "_embed", moved)


def eps_1e_6(patch):
    original = layers.LayerNorm
    patch.setattr(layers, "LayerNorm", lambda *args, **kwargs: original(*args, **kwargs | {"epsilon": 1e-6}))
    patch.setattr(vit, "LayerNorm", layers.LayerNorm)


def gate_and_value_exchanged(patch):
    split = jnp.split
    patch.setattr(
        layers.jnp, "split", lambda x, n, axis=0: split(x, n, axis)[::-1] if axis == -1 else split(x, n, axis)
    )


@pytest.mark.parametrize(
    ("mistake", "name", "group"),
    [
        (rotation_of_registers, PLAIN, "native"),
        (centers(lambda count: 2 * np.arange(count) / count - 1), PLAIN, "native"),
        (centers(lambda count: (np.arange(count) + 0.5) / count), PLAIN, "native"),
        (centers(lambda count: np.arange(count) + 0.5), PLAIN, "larger"),
        (one_normalisation_for_both_axes, PLAIN, "nonsquare"),
        (columns_before_rows, PLAIN, "native"),
        (interleaved_pairs, PLAIN, "native"),
        (turned_the_other_way_for_keys, PLAIN, "native"),
        (periods(base=10_000.0), PLAIN, "native"),
        (periods(rounded_to="bfloat16"), PLAIN, "native"),
        (registers_behind_the_patches, PLAIN, "native"),
        (eps_1e_6, FAINT, "native"),
        (gate_and_value_exchanged, SWIGLU, "native"),
    ],
)
def test_the_mistake_shows(monkeypatch, mistake, name, group):
    reference = read(name, BUNDLED)
    rope._angles.cache_clear()
    mistake(monkeypatch)
    try:
        found = deviations(load(reference, np.float32), reference, group)
    finally:
        monkeypatch.undo()
        rope._angles.cache_clear()
    wrong = too_large(found, "dinov3")
    assert set(wrong) - {"rope_cos", "rope_sin"}, found


def test_a_key_bias_that_is_kept_shows():
    reference = read(PLAIN, BUNDLED)
    state = {name: array for name, array in reference.group("state").items() if not name.endswith("bias_mask")}
    assert np.abs(np.split(state["blocks.0.attn.qkv.bias"], 3)[1]).max() > 0.01
    kept = from_torch(state, config=dataclasses.replace(reference.vit_config(), key_bias=True))
    assert too_large(deviations(kept, reference, "native"), "dinov3")
