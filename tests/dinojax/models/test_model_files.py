"""Models on disk: read back bit for bit, refused when damaged, written whole or not at all."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

from dinojax import UserError, VisionTransformer, ViTConfig, load, save
from dinojax.models import files
from dinojax.models.files import named_parameters

CONFIG = ViTConfig(img_size=28, patch_size=14, embed_dim=16, depth=2, num_heads=2, init_values=1.0)


@pytest.fixture
def model() -> VisionTransformer:
    return VisionTransformer(CONFIG, rngs=nnx.Rngs(0))


def test_a_model_comes_back_as_it_was(model, tmp_path):
    loaded = load(save(model, tmp_path / "model", source={"name": "test"}))
    assert loaded.config == CONFIG
    expected, found = named_parameters(model), named_parameters(loaded)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(expected[name], found[name], err_msg=name)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["source"] == {"name": "test"}


def test_float16_is_for_storage(model, tmp_path):
    """Half the bytes; read as float32, each number the nearest of float16."""
    whole, half = save(model, tmp_path / "whole"), save(model, tmp_path / "half", dtype=np.float16)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (whole, half)]
    assert sizes[1] < 0.55 * sizes[0]
    loaded, expected = named_parameters(load(half)), named_parameters(model)
    for name, array in expected.items():
        assert loaded[name].dtype == np.float32
        np.testing.assert_array_equal(loaded[name], np.asarray(array).astype(np.float16).astype(np.float32))
    model.norm.bias[...] = model.norm.bias[...] + 1e5
    with pytest.raises(UserError, match=r"norm\.bias holds values that float16 cannot"):
        save(model, tmp_path / "large", dtype=np.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "whole"]


def test_saving_again_replaces(model, tmp_path):
    save(model, tmp_path / "model")
    other = VisionTransformer(CONFIG, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(load(save(other, tmp_path / "model")).pos_embed[...], other.pos_embed[...])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["thesis.txt", "config.json"])
def test_other_folders_are_never_replaced(model, tmp_path, name):
    (tmp_path / name).write_text('{"model_type": "years of work"}')
    with pytest.raises(UserError, match="is not a model of dinojax"):
        save(model, tmp_path)
    assert (tmp_path / name).exists()


def test_a_flipped_byte_is_noticed(model, tmp_path):
    weights = save(model, tmp_path / "model") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        load(tmp_path / "model")


@pytest.mark.parametrize("text", ["{", "[]", '{"sha256": ""}', '{"config": {"sides": 6}, "sha256": ""}'])
def test_a_broken_configuration_is_named(model, tmp_path, text):
    (save(model, tmp_path / "model") / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is (not a model configuration|missing or damaged|damaged) \("):
        load(tmp_path / "model")


def test_a_flipped_bit_of_the_configuration_is_refused_or_changes_nothing(model, tmp_path):
    source = {"data": "photos", "epochs": 3}
    config = save(model, tmp_path / "model", source=source) / "config.json"
    content, accepted, bits = config.read_bytes(), 0, np.random.default_rng(0)
    for place in range(len(content)):
        config.write_bytes(content[:place] + bytes([content[place] ^ 1 << bits.integers(8)]) + content[place + 1 :])
        try:
            found = load(tmp_path / "model"), files.read_source(tmp_path / "model")
        except UserError as error:
            assert "\n" not in str(error)
            continue
        accepted += 1
        assert (found[0].config, found[0].preprocessing, found[1]) == (CONFIG, model.preprocessing, source)
    assert accepted < 10


def test_a_model_of_an_earlier_release_is_read_and_its_weights_are_checked(model, tmp_path):
    """Its configuration has the hash of the weights and none of its own, and mean and deviation under `source`."""
    own = {"mean": [0.49, 0.5, 0.51], "std": [0.25, 0.25, 0.25], "image_size": 32}
    folder = save(model, tmp_path / "model", source=own)
    document = json.loads((folder / "config.json").read_text())
    del document["document_sha256"], document["preprocessing"]
    document["sha256"] = document.pop("files_sha256")["model.safetensors"]
    (folder / "config.json").write_text(json.dumps(document))
    found = load(folder)
    np.testing.assert_array_equal(found.pos_embed[...], model.pos_embed[...])
    assert dataclasses.asdict(found.preprocessing) == {
        "mean": (0.49, 0.5, 0.51), "std": (0.25, 0.25, 0.25), "image_size": 32, "patch_size": CONFIG.patch_size,
        "interpolation": "bicubic",
    }  # fmt: skip
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load(folder)


def test_an_absent_model_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere holds no model"):
        load(tmp_path / "nowhere")


def test_a_failed_write_leaves_nothing(model, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
