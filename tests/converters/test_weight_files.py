"""Weight files on disk: every kind that is read, and everything that is refused, with one sentence each."""

import argparse
import json
import os
import pickle
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import safetensors.numpy

import dinojax
from converters import pretrained
from converters.weight_files.state_dicts import read_state_dict
from dinojax import VARIANTS, UserError
from dinojax.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from experiments.features.backbones import load_backbone
from tests.support.tiny_weights import TINY_V1, TINY_V2, assert_holds, official_state, torch_bytes

pytest.importorskip("torch")

STATE = official_state(TINY_V2)
FILE = torch_bytes(STATE)


@pytest.fixture(autouse=True)
def tiny_variant(monkeypatch):
    """One more model with a name, small enough for tests; as data, like the others."""
    monkeypatch.setattr(pretrained, "VARIANTS", MappingProxyType({**VARIANTS, "tiny_vit14": TINY_V2}))


# --- local files that are right


def test_local_files_of_every_kind_give_the_same_model(tmp_path):
    (tmp_path / "zip.pth").write_bytes(FILE)
    (tmp_path / "legacy.pt").write_bytes(torch_bytes(STATE, _use_new_zipfile_serialization=False))
    safetensors.numpy.save_file(STATE, tmp_path / "model.safetensors")
    for name in ("zip.pth", "legacy.pt", "model.safetensors"):
        assert_holds(pretrained.load_pretrained("tiny_vit14", weights=tmp_path / name), STATE)
    dinojax.save(pretrained.read_model(tmp_path / "zip.pth"), tmp_path / "folder")
    assert_holds(pretrained.load_pretrained("tiny_vit14", weights=str(tmp_path / "folder")), STATE)


def test_a_dino_training_checkpoint_with_its_namespace_loads(tmp_path):
    import torch

    teacher = {f"backbone.{name}": torch.from_numpy(array) for name, array in official_state(TINY_V1, 1).items()}
    student = {f"module.backbone.{name}": torch.from_numpy(a) for name, a in official_state(TINY_V1, 2).items()}
    checkpoint = {"teacher": teacher, "student": student, "epoch": 3, "args": argparse.Namespace(arch="vit_small")}
    (tmp_path / "checkpoint.pth").write_bytes(torch_bytes(checkpoint))
    for which, seed in (("teacher", 1), ("student", 2)):
        model = pretrained.read_model(tmp_path / "checkpoint.pth", which=which)
        assert_holds(model, official_state(TINY_V1, seed))


def test_what_runs_no_code_in_a_checkpoint_is_read(tmp_path):
    """Numpy's numbers come back as they were, whatever their byte order; paths as paths."""
    import torch

    numbers = [np.float64(0.7), np.float32(1e-3), np.int64(-5), np.dtype(">f8").type(0.25), np.bool_(True)]
    args = argparse.Namespace(output_dir=tmp_path, device=torch.device("cpu"), shape=torch.Size([1, 2]))
    tensors = {name: torch.from_numpy(array) for name, array in STATE.items()}
    (tmp_path / "file.pth").write_bytes(torch_bytes({"model": tensors, "numbers": numbers, "args": args}))
    found = read_state_dict(tmp_path / "file.pth")
    assert [(type(number), number) for number in found["numbers"]] == [(type(number), number) for number in numbers]
    assert str(found["args"].output_dir) == str(tmp_path) and found["args"].shape == (1, 2)
    assert_holds(pretrained.read_model(tmp_path / "file.pth"), STATE)


def test_which_of_several_networks_was_taken_is_said(tmp_path):
    import torch

    one, other = ({k: torch.from_numpy(v) for k, v in official_state(TINY_V2, seed).items()} for seed in (0, 1))
    said: list[str] = []
    for name, content in {
        "ema": {"model": one, "model_ema": other},
        "training": {"student": other, "teacher": one},
    }.items():
        (tmp_path / f"{name}.pth").write_bytes(torch_bytes(content))
        assert_holds(pretrained.read_model(tmp_path / f"{name}.pth", say=said.append), STATE)
    assert said == [f"{tmp_path}/ema.pth: the weights are those of 'model'; 'model_ema' is left out"]


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "file.pth").write_bytes(torch_bytes(STATE | {"module.norm.bias": STATE["norm.weight"]}))
    with pytest.raises(UserError, match=r"two tensors of the checkpoint are named norm\.bias, one of them module\."):
        pretrained.read_model(tmp_path / "file.pth")


def _hugging_face_folder(folder: Path, preprocessing: dict | None = None, **settings: object) -> Path:
    """Weights and the configuration beside them; `settings` are the ones that a conversion looks at."""
    folder.mkdir()
    safetensors.numpy.save_file(STATE, folder / "model.safetensors")
    sizes = {"model_type": "dinov2", "num_attention_heads": 1, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(sizes | settings))
    if preprocessing is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_norm_eps": 1e-3}, "layer_norm_eps = 0.001, and the model computes with 1e-06"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps = 'small'"),
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new', and the model computes with 'gelu'"),
        ({"qkv_bias": False}, "qkv_bias = False, and the model computes with True"),
    ],
)
def test_settings_that_the_model_does_not_compute_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        pretrained.read_model(_hugging_face_folder(tmp_path / "model", **settings))


def test_dino_s_copy_with_a_smaller_epsilon_is_read(tmp_path):
    """Hugging Face's facebook/dino-* say 1e-12; the sizes of its images are those of its preprocessing."""
    assert_holds(pretrained.read_model(_hugging_face_folder(tmp_path / "model", layer_norm_eps=1e-12)), STATE)


@pytest.mark.parametrize(
    ("preprocessing", "expected"),
    [
        (
            {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.1]},
            {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1]},
        ),
        ({"do_normalize": False, "size": 56}, {"mean": [0, 0, 0], "std": [1, 1, 1], "image_size": 56}),
        ({"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 32}}, {"image_size": 28}),
        ({"do_center_crop": False, "crop_size": 28, "size": {"height": 42, "width": 42}}, {"image_size": 42}),
        ({"image_mean": [0.5], "image_std": [0.2, 0.3, 0.1]}, "are not three numbers each"),
        ({"image_mean": [0.5] * 3, "image_std": [0.2, 0.3, 0.0]}, "are not three numbers each"),
        ({"rescale_factor": 1 / 127.5}, "does not rescale pixels by 1/255"),
    ],
)
def test_the_preprocessing_beside_weights_travels_with_them(tmp_path, preprocessing, expected):
    from converters.__main__ import main

    folder = _hugging_face_folder(tmp_path / "model", preprocessing)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            load_backbone(str(folder), seed=0, cache_dir=tmp_path)
        return
    main([str(folder)])  # converted, and read as it is
    for weights in (folder, tmp_path / "model-flax"):
        backbone = load_backbone(str(weights), seed=0, cache_dir=tmp_path)
        mean, std = expected.get("mean", IMAGENET_MEAN), expected.get("std", IMAGENET_STD)
        assert [list(part) for part in backbone.normalisation] == [list(mean), list(std)]
        assert backbone.image_size == expected.get("image_size", 28)


def test_commands_refuse_weights_of_other_channels(tmp_path):
    state = STATE | {"patch_embed.proj.weight": STATE["patch_embed.proj.weight"][:, :1].copy()}
    (tmp_path / "gray.pth").write_bytes(torch_bytes(state))
    assert pretrained.read_model(tmp_path / "gray.pth").config.in_chans == 1
    with pytest.raises(UserError, match=r"gray\.pth takes images of 1 channels; the commands read red, green, blue"):
        load_backbone(str(tmp_path / "gray.pth"), seed=0, cache_dir=tmp_path)


def test_bfloat16_safetensors_are_read_without_torch(tmp_path):
    import ml_dtypes

    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in STATE.items()}
    _write_safetensors(tmp_path / "half.safetensors", rounded, "BF16")
    model = pretrained.read_model(tmp_path / "half.safetensors")
    assert_holds(model, {name: array.astype(np.float32) for name, array in rounded.items()})


def test_a_hugging_face_folder_tells_its_number_of_heads(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert pretrained.read_model(path).config.num_heads == 4
    with pytest.raises(UserError, match="num_heads 4 instead of 1"):
        pretrained.load_pretrained("tiny_vit14", weights=tmp_path)


def test_shards_are_put_together(tmp_path):
    names = sorted(STATE)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, members in parts.items():
        safetensors.numpy.save_file({name: STATE[name] for name in members}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, members in parts.items() for name in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_holds(pretrained.read_model(tmp_path), STATE)


# --- local files that are wrong


class _Executed:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, form):
    content = {"weight": STATE["norm.bias"], "extra": _Executed(tmp_path / "executed")}
    if form == "pickle":
        (tmp_path / "bad.pth").write_bytes(pickle.dumps(content["extra"], protocol=2))
    else:
        options = {} if form == "zip" else {"_use_new_zipfile_serialization": False}
        (tmp_path / "bad.pth").write_bytes(torch_bytes(content, **options))
    with pytest.raises(UserError, match=r"refused|not a PyTorch weight file"):
        pretrained.load_pretrained("tiny_vit14", weights=tmp_path / "bad.pth")
    assert not (tmp_path / "executed").exists()


LEGACY = torch_bytes(STATE, _use_new_zipfile_serialization=False)
SAFE = safetensors.numpy.save(STATE)
NOT_FINITE = STATE | {"blocks.1.mlp.fc1.bias": np.full(256, np.nan, np.float32)}
BAD_FILES = {
    "empty.pth": (b"", "is empty"),
    "cut.pth": (FILE[: len(FILE) // 2], "damaged or cut off"),
    "cut_legacy.pth": (LEGACY[: len(LEGACY) // 2], "damaged or cut off"),
    "zip_garbage.pth": (b"PK\x03\x04" + bytes(range(256)) * 9, "damaged or cut off"),
    "garbage.pth": (bytes(range(256)) * 9, "not a PyTorch weight file|damaged"),
    "page.pth": (b"\n<!DOCTYPE html><html>403</html>", "is a web page"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "cut.safetensors": (SAFE[: len(SAFE) // 2], "damaged or not a safetensors"),
    "garbage.safetensors": (b"PK\x03\x04" * 9, "damaged or not a safetensors"),
    "tensor.pth": (lambda: _torch_value("tensor"), "holds a Tensor but a dictionary"),
    "numbers.pth": (
        torch_bytes({"epoch": 3, "name": "run"}),
        "not a DINO or DINOv2 backbone|but a tensor was expected",
    ),
    "integers.pth": (torch_bytes(STATE | {"norm.bias": np.zeros(64, np.int64)}), "norm.bias holds int64"),
    "nan.pth": (torch_bytes(NOT_FINITE), r"not finite in blocks\.1\.mlp\.fc1\.bias"),
    "other.pth": (
        torch_bytes(official_state(TINY_V1)),
        "is not a tiny_vit14: img_size 32 instead of 28, patch_size 16",
    ),
}


def _torch_value(kind: str) -> bytes:
    import torch

    return torch_bytes({"tensor": torch.zeros(3)}[kind])


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_gets_one_sentence_with_its_name(tmp_path, name):
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content() if callable(content) else content)
    with pytest.raises(UserError, match=words) as caught:
        pretrained.load_pretrained("tiny_vit14", weights=tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_missing_files_and_empty_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
        pretrained.load_pretrained("tiny_vit14", weights=tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="holds no weights"):
        pretrained.load_pretrained("tiny_vit14", weights=tmp_path)


def test_a_published_model_under_another_name_is_recognised(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "VARIANTS", {"tiny_vit14": TINY_V2, "tiny_vit16": TINY_V1})
    (tmp_path / "file.pth").write_bytes(torch_bytes(official_state(TINY_V1)))
    with pytest.raises(UserError, match="it has the architecture of tiny_vit16"):
        pretrained.load_pretrained("tiny_vit14", weights=tmp_path / "file.pth")


def test_a_long_list_of_differences_is_shortened(tmp_path):
    state = {f"{name}_": array for name, array in STATE.items() if ".1." in name}
    (tmp_path / "file.pth").write_bytes(torch_bytes(STATE | state))
    with pytest.raises(UserError, match=r"do not fit the model in 14 places.*and \d+ more") as caught:
        pretrained.load_pretrained("tiny_vit14", weights=tmp_path / "file.pth")
    assert len(str(caught.value)) < 600


def test_without_torch_the_extra_is_named(monkeypatch, tmp_path):
    (tmp_path / "file.pth").write_bytes(FILE)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"dinojax\[torch\]"):
        pretrained.load_pretrained("tiny_vit14", weights=tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"dinojax\[torch\]"):
        pretrained.load_pretrained("dinov2_vits14", cache_dir=tmp_path)


def test_an_index_of_shards_cannot_lead_outside_its_folder(tmp_path):
    safetensors.numpy.save_file(STATE, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    index = {"weight_map": {"norm.bias": "../secret.safetensors"}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model/secret\.safetensors does not exist"):
        pretrained.read_model(tmp_path / "model")


def _write_safetensors(path: Path, arrays: dict[str, np.ndarray], dtype: str) -> None:
    """The format by hand, because numpy's writer knows no bfloat16: header length, JSON header, bytes."""
    header, data = {}, b""
    for name, array in arrays.items():
        raw = array.tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
