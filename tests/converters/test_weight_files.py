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
from dinojax import VARIANTS, UserError
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
