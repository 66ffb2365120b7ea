"""Checkpoint layouts: every way in which official files wrap, prefix and chunk their tensors, and what is refused."""

import re

import numpy as np
import pytest

from converters import from_torch
from dinojax import UserError
from dinojax.models.files import named_parameters
from tests.support.reference_files import BUNDLED, read

REFERENCE = read("dino_v1_tiny", BUNDLED)
STATE = REFERENCE.group("state")
HEADS = REFERENCE.vit_config().num_heads


def prefixed(prefix: str, state=STATE) -> dict:
    return {f"{prefix}{name}": array for name, array in state.items()}


def chunked(state=STATE) -> dict:
    """Two blocks a chunk; upstream's index counts through all chunks."""

    return {
        re.sub(r"^blocks\.(\d+)", lambda match: f"blocks.{int(match[1]) // 2}.{match[1]}", name): array
        for name, array in state.items()
    }


HEAD = {"mlp.0.weight": np.zeros((4, 48)), "last_layer.weight_v": np.zeros((8, 4))}
OTHER = {name: array + 1 for name, array in STATE.items()}

LAYOUTS = {
    "bare": STATE,
    "module": prefixed("module."),
    "backbone": prefixed("backbone."),
    "backbone and head": prefixed("backbone.") | prefixed("head.", HEAD),
    "module.backbone": prefixed("module.backbone.") | prefixed("module.head.", HEAD),
    "chunked": chunked(),
    "teacher.backbone": prefixed("teacher.backbone.")
    | prefixed("student.backbone.", OTHER)
    | prefixed("teacher.dino_head.", HEAD)
    | {"dino_loss.center": np.zeros((1, 8))},
    "teacher.backbone chunked": prefixed("teacher.backbone.", chunked()) | prefixed("student.backbone.", OTHER),
    "DINO training": {
        "teacher": prefixed("backbone.") | prefixed("head.", HEAD),
        "student": prefixed("module.backbone.", OTHER) | prefixed("module.head.", HEAD),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
    },
    "DINOv2 training": {"model": prefixed("teacher.backbone.") | prefixed("student.backbone.", OTHER), "iteration": 3},
    "DINOv2 evaluation": {"teacher": prefixed("backbone.", chunked()) | prefixed("ibot_head.", HEAD)},
}


def assert_same(model, state):
    expected = named_parameters(from_torch(state, num_heads=HEADS))
    found = named_parameters(model)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model(layout):
    assert_same(from_torch(LAYOUTS[layout], num_heads=HEADS), STATE)


@pytest.mark.parametrize("layout", ["teacher.backbone", "DINO training", "DINOv2 training"])
def test_the_student_is_taken_when_asked(layout):
    assert_same(from_torch(LAYOUTS[layout], num_heads=HEADS, which="student"), OTHER)


def test_kernels_are_transposed_once():
    params = named_parameters(from_torch(STATE, num_heads=HEADS))
    np.testing.assert_array_equal(params["blocks.1.attn.qkv.kernel"], STATE["blocks.1.attn.qkv.weight"].T)
    np.testing.assert_array_equal(
        params["patch_embed.proj.kernel"], STATE["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(params["norm.scale"], STATE["norm.weight"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_torch_tensors_of_every_precision_arrive_in_float32(dtype):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in STATE.items()}
    model = from_torch(tensors, num_heads=HEADS)
    for name, array in named_parameters(model).items():
        assert array.dtype == np.float32, name
    np.testing.assert_array_equal(model.norm.bias[...], tensors["norm.bias"].float())


def test_the_model_does_not_share_memory_with_the_checkpoint():
    state = {name: array.copy() for name, array in STATE.items()}
    model = from_torch(state, num_heads=HEADS)
    for array in state.values():
        array[...] = np.nan
    assert all(np.isfinite(array).all() for array in named_parameters(model).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.bias": None, "cls_token": None}, r"2 places: missing cls_token .*missing norm\.bias"),
        ({"fc.weight": np.zeros((3, 3), np.float32)}, r"extra fc\.weight \(3, 3\)"),
        ({"norm.bias": np.zeros(5, np.float32)}, r"misshapen norm\.bias \(5,\) instead of \(48,\)"),
        ({"norm.bias": np.zeros(48, np.int32)}, r"norm\.bias holds int32"),
        ({"norm.bias": "text"}, r"norm\.bias is of type str"),
        ({"blocks.0.0.norm1.bias": STATE["norm.bias"]}, r"two tensors .*blocks\.0\.norm1\.bias"),
        ({"patch_embed.proj.weight": None}, r"not a DINO or DINOv2 backbone: patch_embed\.proj\.weight missing"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    state = {name: array for name, array in (STATE | change).items() if array is not None}
    with pytest.raises(UserError, match=message):
        from_torch(state, num_heads=HEADS)


@pytest.mark.parametrize(
    ("checkpoint", "which", "message"),
    [
        ({"student": STATE}, "teacher", "holds no 'teacher' weights, only .*student"),
        (prefixed("student.backbone."), "teacher", "holds no 'teacher' weights"),
        ({}, "teacher", "holds no tensors"),
        (STATE, "pupil", "which='pupil'"),
    ],
)
def test_an_absent_network_is_named(checkpoint, which, message):
    with pytest.raises(UserError, match=message):
        from_torch(checkpoint, num_heads=HEADS, which=which)


def test_heads_that_the_shapes_do_not_tell_are_asked_for():
    with pytest.raises(UserError, match=r"embed_dim=48.*pass num_heads"):
        from_torch(STATE)
