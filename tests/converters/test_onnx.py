"""ONNX: what is written runs in onnxruntime with equal outputs, and what PyTorch wrote is read back."""

import contextlib
import io
import json
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import dinojax
from converters import load_classifier
from converters.__main__ import main
from converters.pretrained import read_model
from dinojax.maps import cls_attention
from dinojax.models.files import named_parameters
from tests.support.hugging_face_models import NATIVE, images_of, outputs, random_model

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

OUTPUTS = ["cls", "patches", "attention"]
MODELS = {
    "dinov2": ("dinov2", {}),
    "registers": ("registers", {}),
    "dino": ("dino", {}),
    "swiglu": ("dinov2", {"use_swiglu_ffn": True, "qkv_bias": False}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    for name, (kind, settings) in MODELS.items():
        random_model(kind, **settings).save_pretrained(root / name)
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Dinov2Model by torch.onnx, as optimum writes it; without the config.json that would tell the number of heads."""
    return torch_onnx(random_model("dinov2"), tmp_path_factory.mktemp("torch") / "model.onnx")


def torch_onnx(model, path: Path) -> Path:
    pixels = torch.zeros(2, 3, NATIVE, NATIVE)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (pixels,), path, dynamo=False, opset_version=17, input_names=["pixel_values"],
            dynamic_axes={"pixel_values": {0: "batch"}},
        )  # fmt: skip
    return path


@jax.jit
def both(model, images):
    """Features, and the attention of the last block."""
    return model(images), model.get_last_selfattention(images)


# --- writing


@pytest.mark.parametrize("name", MODELS)
def test_onnxruntime_computes_the_same(folders, tmp_path, capsys, name, record_difference):
    out = tmp_path / "deep/model.onnx"
    main([str(folders[name]), "--to", "onnx", "--out", str(out), "--size", "98", "--outputs", ",".join(OUTPUTS)])
    assert f'onnxruntime.InferenceSession("{out}")' in capsys.readouterr().out
    session, model = onnxruntime.InferenceSession(out), read_model(folders[name])
    registers = model.config.num_register_tokens
    for count in (1, 3, 8):
        images = images_of(98, 98, count)
        features, attention = both(model, images)
        expected = {
            "cls": features.cls_token,
            "patches": features.patch_tokens,
            "attention": cls_attention(attention, 7, 7, num_register_tokens=registers),
        }
        found = session.run(OUTPUTS, {"pixel_values": images.transpose(0, 3, 1, 2)})
        for key, array in zip(OUTPUTS, found):
            record_difference(f"{name} as ONNX", key, np.abs(array - expected[key]).max())
            np.testing.assert_allclose(array, expected[key], rtol=0, atol=3e-5, err_msg=f"{key} of {count}")


def test_the_preprocessing_stands_beside_it_and_comes_back(folders, tmp_path):
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.1], "resample": 2}
    folder = tmp_path / "model"
    folder.mkdir()
    for file in folders["dinov2"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    main([str(folder), "--to", "onnx", "--out", str(tmp_path / "model.onnx")])
    written = json.loads((tmp_path / "model.onnx.json").read_text())
    assert (
        written["preprocessing"]["mean"] == [0.5, 0.4, 0.3] and written["preprocessing"]["interpolation"] == "bilinear"
    )
    assert written["outputs"] == {"cls": ["batch", 32], "patches": ["batch", 25, 32]}
    assert written["input"] == {"name": "pixel_values", "axes": ["batch", 3, NATIVE, NATIVE]}
    assert read_model(tmp_path / "model.onnx").preprocessing == read_model(folder).preprocessing
    (tmp_path / "model.onnx.json").write_text("{}")
    with pytest.raises(dinojax.UserError, match=r"model\.onnx\.json is damaged"):
        read_model(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", MODELS)
def test_what_was_written_is_read_back(folders, tmp_path, name):
    main([str(folders[name]), "--to", "onnx", "--out", str(tmp_path / "model.onnx")])
    assert_same(read_model(tmp_path / "model.onnx"), read_model(folders[name]))


def test_what_cannot_be_written_leaves_nothing(folders, tmp_path, capsys):
    (tmp_path / "there.onnx").write_bytes(b"mine")
    for words, message in {
        ("--out", "new.pt"): "does not end in .onnx",
        ("--out", "there.onnx"): "exists; remove it",
        ("--out", "new.onnx", "--size", "99"): "--size 99 is not a size of images for patches of 14 px; 98 is",
        ("--out", "new.onnx", "--outputs", "cls,tokens"): "--outputs cls,tokens is not a list of different names",
        ("--out", "new.onnx", "--outputs", "cls,cls"): "--outputs cls,cls is not a list of different names",
    }.items():
        words = [str(tmp_path / word) if word.endswith((".onnx", ".pt")) else word for word in words]
        with pytest.raises(SystemExit) as caught:
            main([str(folders["dinov2"]), "--to", "onnx", *words])
        streams = capsys.readouterr()
        assert caught.value.code == 2 and message in streams.err and streams.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.onnx"]


# --- reading


def test_an_export_of_pytorch_is_read_back(exported, tmp_path, capsys):
    """torch folds weights into transposed matrices without names, and cuts the position table in two."""
    names = {tensor.name for tensor in onnx.load(exported).graph.initializer}
    assert "embeddings.position_embeddings" not in names and any(name.startswith("onnx::MatMul") for name in names)
    main([str(exported), "--out", str(tmp_path / "flax"), "--positions", "huggingface"])
    assert "num_heads              2" in capsys.readouterr().out
    model, theirs = dinojax.load(tmp_path / "flax"), random_model("dinov2")
    for size in ((NATIVE, NATIVE), (98, 56)):
        images = images_of(*size)
        features, _ = both(model, images)
        found = np.concatenate([features.cls_token[:, None], features.patch_tokens], axis=1)
        np.testing.assert_allclose(found, outputs(theirs, images).last_hidden_state, rtol=0, atol=3e-5)


def test_a_classifier_and_the_settings_above_the_folder_onnx_are_read(tmp_path):
    theirs = random_model("dino", classes=5)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "onnx").mkdir()
    classifier = load_classifier(torch_onnx(theirs, tmp_path / "onnx/model.onnx"))
    images = images_of(NATIVE, NATIVE)
    assert classifier.class_names[4] == "class 4"
    np.testing.assert_allclose(classifier(images), outputs(theirs, images).logits, rtol=0, atol=3e-5)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(dinojax.UserError, match="computes with 2 attention heads, not with 4"):
        load_classifier(tmp_path / "onnx/model.onnx")


def test_half_precision_and_external_data_are_read(exported, tmp_path):
    proto = onnx.load(exported)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save_model(
        proto, tmp_path / "half.onnx", save_as_external_data=True, location="half.onnx_data", size_threshold=0
    )
    assert (tmp_path / "half.onnx_data").stat().st_size > 1000
    assert_same(read_model(tmp_path / "half.onnx"), read_model(exported), tolerance=1e-3)
    links = tmp_path / "snapshot"
    links.mkdir()
    for name in ("half.onnx", "half.onnx_data"):  # as Hugging Face's cache lays files out
        (links / name).symlink_to(tmp_path / name)
    assert_same(read_model(links / "half.onnx"), read_model(exported), tolerance=1e-3)


def external(proto, location: str, **entries: object) -> None:
    """Moves the first tensor to a file."""
    tensor = next(t for t in proto.graph.initializer if t.name == "embeddings.cls_token")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))


def dims(proto, *sides: int) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == "embeddings.cls_token")
    tensor.ClearField("dims")
    tensor.dims.extend(sides)


def node(proto, kind: str):
    return next(found for found in proto.graph.node if found.op_type == kind)


def rename_bias(proto) -> None:
    """Two layers that claim to be the same one."""
    for found in proto.graph.node:
        for index, name in enumerate(found.input):
            if name == "encoder.layer.0.attention.k_proj.bias":
                found.input[index] = "encoder.layer.0.attention.q_proj.bias"


HOSTILE = {
    "outside": (lambda p: external(p, "../../etc/passwd"), "'../../etc/passwd', which is no file in its folder"),
    "absolute": (lambda p: external(p, "/etc/passwd"), "which is no file in its folder"),
    "link": (lambda p: external(p, "link"), "which is no file in its folder"),
    "offset": (lambda p: external(p, "data", offset=10**12), "cannot be read from data"),
    "length": (lambda p: external(p, "data", length=-1), "cannot be read from data"),
    "words": (lambda p: external(p, "data", length="all"), "cannot be read from data"),
    "few_bytes": (lambda p: external(p, "data"), r"claims 128 bytes \(1, 1, 32\) of which 4 are stored"),
    "giant": (lambda p: dims(p, 2**40, 2**40), "bytes .* of which 128 are stored"),
    "negative": (lambda p: dims(p, -1, 1, 32), "of which 128 are stored"),
    "empty": (lambda p: dims(p, 0, 1, 32), "of which 128 are stored"),
    "integers": (lambda p: setattr(p.graph.initializer[0], "data_type", 7), "does not hold floating-point numbers"),
    "quantised": (lambda p: setattr(node(p, "MatMul"), "op_type", "MatMulInteger"), r"quantised \(MatMulInteger\)"),
    "epsilon": (lambda p: setattr(node(p, "LayerNormalization").attribute[1], "f", 1e-3), "epsilon 0.001 instead of"),
    "twice": (rename_bias, r"two matrices for encoder\.layer\.0\.attention\.q_proj\.weight"),
    "no_norm": (lambda p: p.graph.node.remove(node(p, "Conv")), None),
    "other": (lambda p: p.graph.ClearField("initializer"), "no tensors under Hugging Face's names|missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_in_one_sentence(exported, tmp_path, name):
    damage, message = HOSTILE[name]
    proto = onnx.load(exported)
    damage(proto)
    (tmp_path / "data").write_bytes(b"1234")
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "bad.onnx").write_bytes(proto.SerializeToString())
    if message is None:  # a node that holds no parameter: the tensors are all there
        read_model(tmp_path / "bad.onnx")
        return
    with pytest.raises(dinojax.UserError, match=message) as caught:
        read_model(tmp_path / "bad.onnx")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("content", [b"", b"<html>", bytes(range(256)) * 20], ids=["empty", "page", "garbage"])
def test_what_is_no_onnx_file_is_refused(tmp_path, content):
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(dinojax.UserError, match=r"bad\.onnx"):
        read_model(tmp_path / "bad.onnx")


def test_a_cut_file_is_refused(exported, tmp_path):
    content = exported.read_bytes()
    for share in (0.2, 0.5, 0.9):
        (tmp_path / "cut.onnx").write_bytes(content[: int(share * len(content))])
        with pytest.raises(dinojax.UserError, match=r"cut\.onnx"):
            read_model(tmp_path / "cut.onnx")


def test_without_the_package_the_extra_is_named(exported, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(dinojax.UserError, match=r"dinojax\[onnx\]"):
        read_model(exported)


def assert_same(found, expected, tolerance: float = 0) -> None:
    """Equal configurations and parameters, except for the mask token, which exports leave out."""
    assert found.config == expected.config
    ours, theirs = (named_parameters(model) for model in (found, expected))
    for name in theirs:
        if name != "mask_token":
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=tolerance, err_msg=name)
