"""Backbones equal the official PyTorch code: every stored output, stage by stage, in float32 and float64."""

import dataclasses

import jax
import numpy as np
import pytest

from converters import from_torch
from tests.support.backbone_parity import deviations, kind, load, too_large
from tests.support.reference_files import inputs, names, read

BACKBONES = names("dino*_tiny*")
CASES = [(name, group) for name in BACKBONES for group in inputs(name)]


@pytest.mark.reference
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "group"), CASES)
def test_every_output_equals_the_official_one(name, group, dtype, record_difference):
    reference = read(name)
    with jax.enable_x64(dtype == "float64"):
        found = deviations(load(reference, np.dtype(dtype).type), reference, group)
    assert found
    for output, difference in found.items():
        record_difference(f"{name} (official code, {dtype})", kind(output), difference)
    wrong = too_large(found, reference.vit_config().family, dtype)
    assert not wrong, f"first stage that differs: {next(iter(wrong))}; all: {wrong}"


@pytest.mark.reference
@pytest.mark.parametrize("name", BACKBONES)
def test_the_configuration_is_inferred_from_the_shapes(name):
    reference = read(name)
    expected = reference.vit_config()
    model = from_torch(reference.group("state"), num_heads=expected.num_heads)
    if expected.family == "dinov3":  # which has no table, and whose tensors do not tell the eps
        expected = dataclasses.replace(
            expected, img_size=model.config.img_size, layer_norm_eps=model.config.layer_norm_eps
        )
    assert model.config == expected
