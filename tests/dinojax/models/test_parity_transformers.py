"""Converted models equal PyTorch live: `transformers`' DINOv2 with random weights, ViT-S/14 at 224 and 518 px."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from converters import from_torch
from dinojax import VARIANTS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = [(224, 224), (518, 518), (140, 252)]


def random_model(registers: bool, **changes) -> "torch.nn.Module":
    """A DINOv2 of `transformers` in which no tensor has the value it starts with."""
    settings = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14} | changes
    torch.manual_seed(0)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**settings)
        model = transformers.Dinov2WithRegistersModel(config).eval()
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def as_transformers(config):
    """The interpolation of `transformers`, which is upstream's only for the models with registers."""
    return dataclasses.replace(config, interpolate_offset=0.0)


# slow: a second ViT-S/14; with registers only the order of the tokens differs
@pytest.mark.parametrize("registers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_features_and_attention_equal_pytorch(registers, record_difference):
    theirs = random_model(registers, attn_implementation="eager")
    config = as_transformers(VARIANTS["dinov2_vits14_reg" if registers else "dinov2_vits14"])
    ours = from_torch(theirs.state_dict(), config=config)
    for height, width in SIZES:
        images = np.random.default_rng(height).standard_normal((1, height, width, 3), np.float32)
        with torch.no_grad():
            expected = theirs(
                torch.from_numpy(images.transpose(0, 3, 1, 2)), output_hidden_states=True, output_attentions=True
            )
        found = jax.jit(lambda model, x: model(x))(ours, images)
        tokens = np.concatenate([found.cls_token[:, None], found.register_tokens, found.patch_tokens], axis=1)
        title = f"{type(theirs).__name__} S/14, {height}×{width} (live, float32)"
        record_difference(title, "features", float(np.abs(tokens - expected.last_hidden_state.numpy()).max()))
        np.testing.assert_allclose(tokens, expected.last_hidden_state.numpy(), rtol=0, atol=3e-5)
        np.testing.assert_allclose(found.prenorm, expected.hidden_states[-1].numpy(), rtol=1e-5, atol=3e-5)
        attention = jax.jit(lambda model, x: model.get_last_selfattention(x))(ours, images)
        record_difference(title, "attention", float(np.abs(attention - expected.attentions[-1].numpy()).max()))
        np.testing.assert_allclose(attention, expected.attentions[-1].numpy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("swiglu", [False, True])
def test_the_names_on_disk_are_the_names_in_memory(tmp_path, registers, swiglu):
    """Hugging Face's files keep names that its modules no longer have."""
    changes = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2, "image_size": 56}
    theirs = random_model(registers, use_swiglu_ffn=swiglu, **changes)
    theirs.save_pretrained(tmp_path)
    images = np.random.default_rng(0).standard_normal((2, 56, 56, 3), np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).last_hidden_state[:, 0]
    for state in (theirs.state_dict(), load_file(tmp_path / "model.safetensors")):
        np.testing.assert_allclose(from_torch(state)(images).cls_token, expected, rtol=0, atol=3e-5)


def test_dino_under_hugging_face_names(tmp_path):
    """`facebook/dino-vits16` is a plain ViT there, with a pooler that DINO does not have."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 256}
    config = transformers.ViTConfig(**sizes, image_size=56, patch_size=14, layer_norm_eps=1e-6)
    theirs = transformers.ViTModel(config).eval()
    theirs.save_pretrained(tmp_path)
    images = np.random.default_rng(0).standard_normal((2, 56, 56, 3), np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).last_hidden_state[:, 0]
    for state in (theirs.state_dict(), load_file(tmp_path / "model.safetensors")):
        model = from_torch(state)
        assert model.config.family == "dino"
        np.testing.assert_allclose(model(images).cls_token, expected, rtol=0, atol=3e-5)
