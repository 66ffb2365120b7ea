"""DINOv3 equals PyTorch live: `DINOv3ViTModel` of `transformers`, random weights, every token, block and attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from converters import from_torch
from dinojax import VARIANTS
from tests.support.dinov3_models import GATED, in_double, random_dinov3, run

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = [(64, 64), (224, 224), (256, 160), (512, 512)]
CASES = [
    ({}, (64, 64)),
    ({}, (256, 160)),
    pytest.param({}, (224, 224), marks=pytest.mark.slow),  # the two larger ones: a second more each
    pytest.param({}, (512, 512), marks=pytest.mark.slow),
    (GATED | {"query_bias": False, "value_bias": False}, (64, 96)),
    ({"key_bias": True, "num_register_tokens": 0, "rope_theta": 30.0, "patch_size": 8}, (64, 96)),
]


@jax.jit
def every_output(model, images, masks=None):
    """Tokens, the raw output of every block without registers, and the last attention."""
    found = model(images, masks)
    tokens = jnp.concatenate([found.cls_token[:, None], found.register_tokens, found.patch_tokens], axis=1)
    layers = model.get_intermediate_layers(images, len(model.blocks), return_class_token=True, norm=False)
    blocks = [jnp.concatenate([cls_token[:, None], patches], axis=1) for patches, cls_token in layers]
    return tokens, blocks, model.get_last_selfattention(images)


def differences(theirs, ours, images: np.ndarray) -> dict[str, float]:
    expected = run(theirs, images)
    tokens, blocks, attention = every_output(ours, images)
    first_patch = 1 + ours.config.num_register_tokens
    assert len(blocks) + 1 == len(expected["blocks"])
    pairs = [(ours, np.delete(theirs, np.s_[1:first_patch], 1)) for ours, theirs in zip(blocks, expected["blocks"][1:])]
    for our_block, their_block in pairs:  # before the final norm, so that values are of any size
        np.testing.assert_allclose(our_block, their_block, rtol=1e-5, atol=3e-5)
    return {
        "tokens": float(np.abs(tokens - expected["tokens"]).max()),
        "blocks": max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs),
        "attention": float(np.abs(attention - expected["attention"][-1]).max()),
    }


@pytest.mark.parametrize(("settings", "size"), CASES)
def test_every_output_equals_pytorch(settings, size, record_difference):
    theirs = random_dinov3(**settings)
    stated = {"rope_base": settings.get("rope_theta", 100.0)}
    ours = from_torch(theirs.state_dict(), num_heads=2, stated=stated)
    images = np.random.default_rng(0).standard_normal((1, *size, 3), np.float32)
    found = differences(theirs, ours, images)
    for name, difference in found.items():
        record_difference(f"DINOv3ViTModel {size[0]}×{size[1]} {' '.join(settings)} (live, float32)", name, difference)
    assert found["tokens"] < 3e-5 and found["attention"] < 5e-6, found


@pytest.mark.parametrize("size", [(64, 96), pytest.param((256, 160), marks=pytest.mark.slow)])  # as above
def test_every_output_equals_pytorch_in_float64(monkeypatch, size, record_difference):
    theirs = in_double(random_dinov3(**GATED), monkeypatch)
    with jax.enable_x64(True):
        ours = from_torch(theirs.state_dict(), num_heads=2)
        found = differences(theirs, ours, np.random.default_rng(0).standard_normal((2, *size, 3)))
    for name, difference in found.items():
        record_difference(f"DINOv3ViTModel {size[0]}×{size[1]} (live, float64)", name, difference)
    assert max(found.values()) < 1e-12, found


def test_masked_patches_equal_pytorch():
    theirs = random_dinov3()
    ours = from_torch(theirs.state_dict(), num_heads=2)
    images = np.random.default_rng(0).standard_normal((2, 64, 96, 3), np.float32)
    masks = np.random.default_rng(1).random((2, 24)) < 0.4
    expected = run(theirs, images, masks)["tokens"]
    np.testing.assert_allclose(every_output(ours, images, masks)[0], expected, rtol=0, atol=3e-5)


def test_the_names_on_disk_are_the_names_in_memory(tmp_path):
    theirs = random_dinov3(**GATED)
    theirs.save_pretrained(tmp_path)
    images = np.random.default_rng(0).standard_normal((2, 64, 96, 3), np.float32)
    expected = run(theirs, images)["tokens"]
    on_disk = load_file(tmp_path / "model.safetensors")
    assert set(on_disk) != set(theirs.state_dict())
    for state in (theirs.state_dict(), on_disk):
        np.testing.assert_allclose(every_output(from_torch(state, num_heads=2), images)[0], expected, rtol=0, atol=3e-5)


@pytest.mark.slow  # ViT-S/16, and PyTorch's on one core
@pytest.mark.parametrize("size", SIZES)
def test_vit_s_16_equals_pytorch(size, record_difference):
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    theirs = random_dinov3(0.05, **sizes)
    ours = from_torch(theirs.state_dict(), config=VARIANTS["dinov3_vits16"])
    found = differences(theirs, ours, np.random.default_rng(0).standard_normal((1, *size, 3), np.float32))
    for name, difference in found.items():
        record_difference(f"DINOv3ViTModel S/16, {size[0]}×{size[1]} (live, float32)", name, difference)
    assert found["tokens"] < 3e-5 and found["attention"] < 5e-6, found
