"""DINOv3 weights: official and Hugging Face's names, the buffers that are checked, settings, and what is written."""

import json
from pathlib import Path

import numpy as np
import pytest

import dinojax
from converters import from_torch, load_pretrained, to_torch
from converters.__main__ import main
from converters.pretrained import fetch, read_model
from dinojax import UserError
from dinojax.models.files import named_parameters, read_source
from dinojax.models.preprocessing import IMAGENET_MEAN
from dinojax.models.rope import periods
from tests.support.dinov3_models import GATED, random_dinov3, run
from tests.support.reference_files import BUNDLED, read
from tests.support.tiny_weights import torch_bytes

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PLAIN, SWIGLU = (read(name, BUNDLED) for name in ("dinov3_tiny", "dinov3_tiny_swiglu64"))
PROCESSOR = {
    "image_processor_type": "DINOv3ViTImageProcessorFast", "do_resize": True, "size": {"height": 224, "width": 224},
    "do_center_crop": None, "crop_size": None, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "resample": 2, "image_mean": [0.430, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143],
}  # fmt: skip


def images(height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(height).standard_normal((2, height, width, 3), np.float32)


def tokens(model) -> np.ndarray:
    found = model(images())
    return np.concatenate([found.cls_token[:, None], found.register_tokens, found.patch_tokens], axis=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A gated model as `save_pretrained` writes it, with a `rope_theta`, an eps and an image size of its own."""
    folder = tmp_path_factory.mktemp("hub") / "dinov3"
    random_dinov3(**GATED, rope_theta=50.0, layer_norm_eps=1e-3, image_size=128).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


# --- official names


@pytest.mark.parametrize("reference", [PLAIN, SWIGLU], ids=["mlp", "swiglu"])
@pytest.mark.parametrize("num_heads", [None, 3])
def test_official_names_are_recognised_and_given_back(reference, num_heads):
    """Whatever the mask covers in `qkv.bias` comes back as zero; everything else comes back as it was."""
    state = reference.group("state")
    local = {f"local_cls_norm.{part}": np.ones(48, np.float32) for part in ("weight", "bias")}
    model = from_torch({"teacher": {f"backbone.{k}": v for k, v in (state | local).items()}}, num_heads=num_heads)
    assert model.config.family == "dinov3" and model.config.num_heads == 3
    found = to_torch(model)
    assert found.keys() == state.keys()
    for name, array in state.items():
        wanted = array * state[f"{name}_mask"] if name.endswith("qkv.bias") else array
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6, err_msg=name)


def test_published_periods_are_rounded_and_the_rounding_is_kept():
    state = PLAIN.group("state")
    rounded = periods(16, 100.0, "bfloat16").astype(np.float32)
    model = from_torch(state | {"rope_embed.periods": rounded})
    assert model.config.rope_periods == "bfloat16" and model.config.rope_base == 100
    np.testing.assert_array_equal(to_torch(model)["rope_embed.periods"], rounded)
    told = from_torch(state | {"rope_embed.periods": rounded}, config=PLAIN.vit_config())
    assert told.config.rope_periods == "bfloat16"
    other = from_torch(state | {"rope_embed.periods": periods(16, 2000.0).astype(np.float32)})
    assert (other.config.rope_base, other.config.rope_periods) == (2000.0, "float32")


def test_without_periods_heads_are_those_of_the_published_model():
    from converters.dinov3.official import infer_rotation

    for dim, heads in ((384, 6), (1280, 20), (4096, 32), (80, None)):
        found = infer_rotation({"patch_embed.proj.weight": np.zeros((dim, 3, 16, 16))}, None)
        assert found == {"num_heads": heads, "rope_base": 100.0, "rope_periods": "float32"}


_MASK = "blocks.1.attn.qkv.bias_mask"


@pytest.mark.parametrize(
    ("changes", "num_heads", "message"),
    [
        ({_MASK: np.ones(144, np.float32)}, None, f"{_MASK} is not one for queries and values and zero for keys"),
        ({_MASK: np.full(144, np.nan, np.float32)}, None, f"{_MASK} is not one for queries"),
        ({_MASK: np.ones(48, np.float32)}, None, rf"misshapen {_MASK} \(48,\)"),
        ({"rope_embed.periods": np.array([1, 2, 3, 4], np.float32)}, None, "are not powers of one base"),
        ({"rope_embed.periods": np.full(4, np.nan, np.float32)}, None, "are not powers of one base"),
        ({"rope_embed.periods": np.ones(5, np.float32)}, None, r"misshapen rope_embed.periods \(5,\)"),
        ({}, 4, "4 periods, which are those of 3 heads, not of 4"),
        ({"rope_embed.periods": np.array([1, 2, 3, -4], np.float32)}, None, "are not powers of one base"),
        ({"blocks.0.attn.qkv.bias": None}, None, "missing blocks.0.attn.qkv.bias, of which"),
        ({"blocks.0.mlp.fc1.bias": None}, None, "missing blocks.0.mlp.fc1.bias"),
        ({"cls_norm.weight": np.ones(48, np.float32)}, None, "extra cls_norm.weight"),
        ({"storage_tokens": np.ones((4, 48), np.float32)}, None, "misshapen register_tokens"),
        ({"patch_embed.proj.weight": None}, None, "not a DINOv3 backbone: patch_embed.proj.weight missing"),
        ({"pos_embed": np.ones((1, 17, 48), np.float32)}, 3, "extra"),
    ],
)
def test_what_is_not_a_dinov3_is_named(changes, num_heads, message):
    state = {name: array for name, array in (PLAIN.group("state") | changes).items() if array is not None}
    with pytest.raises(UserError, match=message):
        from_torch(state, num_heads=num_heads)


def test_periods_of_another_base_than_the_configuration_s_are_refused():
    config = dinojax.ViTConfig(**PLAIN.vit_config().settings() | {"rope_base": 50.0})
    with pytest.raises(UserError, match="are not the 4 periods of rope_base=50 with num_heads=3"):
        from_torch(PLAIN.group("state"), config=config)


# --- Hugging Face's folders


def test_a_folder_states_what_its_tensors_do_not(folder):
    model = read_model(folder)
    assert (model.config.rope_base, model.config.layer_norm_eps, model.config.img_size) == (50.0, 1e-3, 128)
    preprocessing = model.preprocessing
    assert preprocessing.mean == (0.430, 0.411, 0.296) and preprocessing.interpolation == "bilinear"
    np.testing.assert_allclose(tokens(model), run(random_dinov3_of(folder), images())["tokens"], rtol=0, atol=3e-5)


def random_dinov3_of(folder: Path):
    """What `transformers` reads from a folder."""
    return transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', and the model computes with 'silu'"),
        ({"key_bias": True}, "key_bias = True, and the model computes with False"),
        ({"use_gated_mlp": False}, "and the model computes with True"),
        ({"proj_bias": False}, "proj_bias = False"),
        ({"num_register_tokens": 2}, "num_register_tokens = 2, and the weights beside it have 4"),
        ({"intermediate_size": 64}, "intermediate_size = 64"),
        ({"model_type": "dinov2"}, "model_type = 'dinov2', and the model computes with dinov3_vit"),
        ({"rope_theta": "far"}, "rope_theta = 'far', not a number"),
        ({"image_size": [64, 32]}, r"image_size = \[64, 32\], not a number"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps=-1.0 is not a number"),
    ],
)
def test_settings_that_the_weights_contradict_are_named(folder, tmp_path, settings, message):
    stated = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | settings))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        read_model(tmp_path)


def test_a_conversion_is_verified_tells_the_terms_once_and_goes_back(folder, tmp_path, capsys):
    main([str(folder), "--out", str(tmp_path / "flax"), "--verify"])
    printed = capsys.readouterr().out
    assert printed.count("DINOv3 License") == 1 and "dinov3-license" in printed
    assert "DINOv3ViTModel: largest absolute difference" in printed and "): equal" in printed
    assert read_source(tmp_path / "flax")["license"] == "DINOv3 License"
    main([str(tmp_path / "flax"), "--to", "huggingface", "--out", str(tmp_path / "back")])
    assert "DINOv3 License" not in capsys.readouterr().out
    expected = run(random_dinov3_of(folder), images())["tokens"]
    np.testing.assert_allclose(run(random_dinov3_of(tmp_path / "back"), images())["tokens"], expected, atol=1e-6)
    assert named_parameters(read_model(tmp_path / "back")).keys() == named_parameters(read_model(folder)).keys()


@pytest.mark.slow  # two exports and onnxruntime
def test_programs_compute_the_same(folder, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    import jax.export

    pixels, model = images(64, 64), read_model(folder)
    expected = {"cls": model(pixels).cls_token, "patches": model(pixels).patch_tokens}
    for suffix in ("onnx", "stablehlo"):
        main([str(folder), "--to", suffix, "--size", "64", "--out", str(tmp_path / f"model.{suffix}")])
    run_onnx = onnxruntime.InferenceSession(tmp_path / "model.onnx").run
    found = {"onnx": dict(zip(expected, run_onnx(list(expected), {"pixel_values": pixels.transpose(0, 3, 1, 2)})))}
    program = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
    found["stablehlo"] = program.call(pixels)
    for kind, outputs in found.items():
        for name, array in expected.items():
            np.testing.assert_allclose(outputs[name], array, rtol=0, atol=3e-5, err_msg=f"{kind} {name}")
    with pytest.raises(UserError, match="ONNX files are written but not read"):
        read_model(tmp_path / "model.onnx")


# --- published models


def test_weights_are_never_downloaded(tmp_path):
    for name, place in (
        ("dinov3_vits16", "facebook/dinov3-vits16-pretrain-lvd1689m"),
        ("dinov3_vit7b16_sat493m", "facebook/dinov3-vit7b16-pretrain-sat493m"),
    ):
        for get in (fetch, load_pretrained):
            with pytest.raises(UserError, match="are under the DINOv3 License") as caught:
                get(name, cache_dir=tmp_path)
            assert place in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_satellite_model_has_its_own_normalisation(tmp_path, monkeypatch, capsys):
    from converters import pretrained

    tiny = from_torch(PLAIN.group("state")).config
    monkeypatch.setattr(pretrained, "VARIANTS", {"dinov3_tiny": tiny, "dinov3_tiny_sat493m": tiny})
    for file in ("mine.pth", "dinov3_tiny_pretrain_sat493m-0123.pth"):
        (tmp_path / file).write_bytes(torch_bytes(PLAIN.group("state")))
    satellite = (0.430, 0.411, 0.296)
    for name, file, mean in (
        ("dinov3_tiny", "mine.pth", IMAGENET_MEAN),
        ("dinov3_tiny_sat493m", "mine.pth", satellite),
        ("dinov3_tiny", "dinov3_tiny_pretrain_sat493m-0123.pth", satellite),
    ):
        preprocessing = load_pretrained(name, weights=tmp_path / file).preprocessing
        assert preprocessing.mean == mean and preprocessing.interpolation == "bilinear"
    main([str(tmp_path / "dinov3_tiny_pretrain_sat493m-0123.pth"), "--out", str(tmp_path / "out")])
    assert "normalised with the satellites' mean (0.43, 0.411, 0.296)" in capsys.readouterr().out
    assert dinojax.load(tmp_path / "out").preprocessing.mean == satellite
