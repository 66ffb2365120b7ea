"""Folders of `transformers`, both ways, live: positions, settings, classifiers, and what is written for it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import dinojax
from converters import load_classifier, load_pretrained
from converters.__main__ import main
from converters.huggingface.positions import with_positions
from converters.pretrained import read_model
from tests.support.hugging_face_models import KINDS, NATIVE, images_of, outputs, random_model

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = [(NATIVE, NATIVE), (56, 56), (98, 98), (224, 224), (140, 182)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Kind → folder of `save_pretrained`; "KIND classifier" → one with a head of five classes."""
    root = tmp_path_factory.mktemp("hub")
    for kind in KINDS:
        random_model(kind).save_pretrained(root / kind)
        random_model(kind, classes=5).save_pretrained(root / f"{kind} classifier")
    return {path.name: path for path in root.iterdir()}


@jax.jit
def tokens(model, images) -> jax.Array:
    features = model(images)
    return jnp.concatenate([features.cls_token[:, None], features.register_tokens, features.patch_tokens], axis=1)


# --- positions


@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_hugging_face_equal_transformers_at_every_size(folders, kind, record_difference):
    theirs, ours = random_model(kind), read_model(folders[kind], positions="huggingface")
    for size in SIZES:
        images = images_of(*size)
        expected, found = outputs(theirs, images).last_hidden_state.numpy(), tokens(ours, images)
        record_difference(
            f"{type(theirs).__name__}, positions of huggingface", "tokens", np.abs(found - expected).max()
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_of_the_hub_are_upstream_s(folders, kind, record_difference):
    """torch.hub's DINO and DINOv2 resize with +0.1, so away from the native size transformers differs."""
    ours = read_model(folders[kind])
    assert ours.config == read_model(folders[kind], positions="hub").config
    assert ours.config.interpolate_offset == (0 if kind == "registers" else 0.1)
    differences = {}
    for size in (NATIVE, 98):
        images = images_of(size, size)
        expected = outputs(random_model(kind), images).last_hidden_state.numpy()
        differences[size] = float(np.abs(tokens(ours, images) - expected).max())
        title = f"{kind}, positions of the hub, {size} px (native: {NATIVE})"
        record_difference(title, "tokens", differences[size])
    assert differences[NATIVE] < 3e-5
    assert differences[98] < 3e-5 if kind == "registers" else 3e-3 < differences[98] < 0.1


def test_a_conversion_keeps_its_positions_and_says_what_differs(folders, tmp_path, capsys):
    main([str(folders["dinov2"]), "--out", str(tmp_path / "hub")])
    assert (
        "at other sizes than 70 px its outputs differ by about 1e-2; --positions huggingface" in capsys.readouterr().out
    )
    main([str(folders["dinov2"]), "--out", str(tmp_path / "same"), "--positions", "huggingface"])
    main([str(folders["registers"]), "--out", str(tmp_path / "registers")])
    assert "--positions" not in capsys.readouterr().out
    assert dinojax.load(tmp_path / "hub").config.interpolate_offset == 0.1
    assert read_model(tmp_path / "same").config.interpolate_offset == 0
    assert read_model(tmp_path / "same", positions="hub").config.interpolate_offset == 0.1


def test_load_pretrained_takes_positions(monkeypatch, folders):
    from converters import pretrained

    tiny = read_model(folders["dinov2"]).config
    monkeypatch.setattr(pretrained, "VARIANTS", {"tiny": tiny})
    for positions, offset in ((None, 0.1), ("hub", 0.1), ("huggingface", 0)):
        model = load_pretrained("tiny", weights=folders["dinov2"], positions=positions)
        assert model.config.interpolate_offset == offset
    with pytest.raises(dinojax.UserError, match="positions='torch' is not 'hub' or 'huggingface'"):
        with_positions(tiny, "torch")


# --- settings beside the weights


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("dinov2", {"image_size": 98}, "image_size = 98, and the weights beside it have 70"),
        ("dinov2", {"image_size": [70, 140]}, r"image_size = \[70, 140\]"),
        ("dinov2", {"num_hidden_layers": 1}, "num_hidden_layers = 1, and the weights beside it have 2"),
        ("dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn = True"),
        ("dinov2", {"mlp_ratio": 2}, "mlp_ratio = 2, and the weights beside it have 128 hidden channels"),
        ("dinov2", {"qkv_bias": False}, "qkv_bias = False, and the model computes with True"),
        ("dinov2", {"model_type": "dinov3_vit"}, "model_type = 'dinov3_vit', and the model computes with dinov2 or"),
        ("dinov2", {"num_attention_heads": "two"}, "num_attention_heads = 'two', not a positive whole number"),
        ("dinov2", {"num_attention_heads": 5}, "num_heads=5"),
        ("registers", {"num_register_tokens": 5}, "num_register_tokens = 5, and the weights beside it have 4"),
        ("dino", {"intermediate_size": 128}, "intermediate_size = 128, and the weights beside it have 64"),
        ("dino", {"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu', and the model computes with 'gelu'"),
    ],
)
def test_settings_that_the_weights_contradict_are_named(folders, tmp_path, kind, settings, message):
    with pytest.raises(dinojax.UserError, match=message):
        read_model(changed(folders[kind], tmp_path, **settings))


def test_a_damaged_config_is_refused(folders, tmp_path):
    folder = changed(folders["dinov2"], tmp_path)
    (folder / "config.json").write_text('{"model_type": "dinov2"')
    with pytest.raises(dinojax.UserError, match=r"config\.json is damaged"):
        read_model(folder)


@pytest.mark.parametrize("swiglu", [False, True])
def test_swiglu_and_projections_without_bias_are_computed(tmp_path, swiglu):
    theirs = random_model("dinov2", use_swiglu_ffn=swiglu, qkv_bias=False)
    theirs.save_pretrained(tmp_path / "model")
    images = images_of(NATIVE, NATIVE)
    expected = outputs(theirs, images).last_hidden_state
    np.testing.assert_allclose(tokens(read_model(tmp_path / "model"), images), expected, rtol=0, atol=3e-5)


def test_a_dinov2_without_a_mask_token_is_read(folders, tmp_path):
    folder = changed(folders["dinov2"], tmp_path, use_mask_token=False)
    state = load_file(folder / "model.safetensors")
    del state["embeddings.mask_token"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model, images = read_model(folder), images_of(NATIVE, NATIVE)
    assert not np.asarray(model.mask_token[...]).any()
    expected = outputs(transformers.Dinov2Model.from_pretrained(folder).eval(), images).last_hidden_state
    np.testing.assert_allclose(tokens(model, images), expected, rtol=0, atol=3e-5)
    with pytest.raises(dinojax.UserError, match="missing mask_token"):
        read_model(changed(folder, tmp_path / "claimed", use_mask_token=True))


def test_the_way_of_resizing_is_that_of_the_processor(folders, tmp_path):
    folder = changed(folders["dinov2"], tmp_path)
    for resample, name in ((2, "bilinear"), (3, "bicubic"), (1, "lanczos")):
        (folder / "preprocessor_config.json").write_text(json.dumps({"resample": resample}))
        assert read_model(folder).preprocessing.interpolation == name
    (folder / "preprocessor_config.json").write_text(json.dumps({"resample": 4}))
    with pytest.raises(dinojax.UserError, match="resample = 4, and dinojax resizes with"):
        read_model(folder)


def test_sharded_and_pickled_folders_are_read(tmp_path):
    import torch

    theirs = random_model("dinov2")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    (tmp_path / "pickled").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    (tmp_path / "pickled/config.json").write_bytes((tmp_path / "shards/config.json").read_bytes())
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    images = images_of(NATIVE, NATIVE)
    expected = outputs(theirs, images).last_hidden_state
    for folder in ("shards", "pickled"):
        np.testing.assert_allclose(tokens(read_model(tmp_path / folder), images), expected, rtol=0, atol=3e-5)


# --- classifiers


# slow: the same head on two more backbones
@pytest.mark.parametrize("kind", ["dinov2", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "dinov2")])
def test_logits_equal_transformers(folders, kind):
    classifier = load_classifier(folders[f"{kind} classifier"], positions="huggingface")
    assert classifier.class_names == tuple(f"class {index}" for index in range(5))
    assert classifier.head.config.mean_patch == (kind != "dino")
    theirs = random_model(kind, classes=5)
    for size in ((NATIVE, NATIVE), (98, 56)):
        images = images_of(*size)
        np.testing.assert_allclose(classifier(images), outputs(theirs, images).logits, rtol=0, atol=3e-5)


def test_a_classifier_is_never_left_out_in_silence(folders, tmp_path, capsys):
    folder = folders["dinov2 classifier"]
    with pytest.warns(UserWarning, match=r"its classifier is left out; converters\.load_classifier"):
        model = read_model(folder)
    assert np.array_equal(model.norm.bias[...], load_classifier(folder).backbone.norm.bias[...])
    main([str(folder), "--out", str(tmp_path / "flax"), "--verify"])
    printed = capsys.readouterr().out
    assert "its classifier is left out" in printed and "(bound 3e-05): equal" in printed
    with pytest.raises(dinojax.UserError, match="holds no classifier"):
        load_classifier(folders["dinov2"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"classifier.weight": np.zeros((5, 32), np.float32)}, r"expected are \(classes, 64\) and \(classes,\)"),
        ({"classifier.bias": None}, "this one has weight"),
        ({"classifier.weight": np.full((5, 64), np.nan, np.float32)}, "not finite in its classifier"),
        ({"id2label": {"0": "a", "7": "b"}}, "id2label in config.json does not name the 5 classes"),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused(folders, tmp_path, damage, message):
    settings = {name: value for name, value in damage.items() if "." not in name}
    folder = changed(folders["dinov2 classifier"], tmp_path, **settings)
    state = load_file(folder / "model.safetensors") | {n: v for n, v in damage.items() if "." in n}
    save_file({name: array for name, array in state.items() if array is not None}, folder / "model.safetensors")
    with pytest.raises(dinojax.UserError, match=message):
        load_classifier(folder)


# --- and back


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gets_back_what_it_gave(folders, tmp_path, capsys, kind):
    main([str(folders[kind]), "--to", "huggingface", "--out", str(tmp_path / "back"), "--positions", "huggingface"])
    printed = capsys.readouterr().out
    assert f'AutoModel.from_pretrained("{tmp_path}/back"' in printed and "note:" not in printed
    plain = {"add_pooling_layer": False} if kind == "dino" else {}
    back, given = transformers.AutoModel.from_pretrained(tmp_path / "back", **plain).eval(), random_model(kind)
    assert type(back) is type(given) and back.state_dict().keys() == given.state_dict().keys()
    for name, tensor in given.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[name], tensor, err_msg=name)
    images = images_of(56, 84)
    expected, found = outputs(given, images).last_hidden_state, outputs(back, images).last_hidden_state
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)  # ViTConfig's epsilon is 1e-12, ours is DINO's 1e-6


def test_swiglu_goes_back_too(tmp_path):
    given = random_model("dinov2", use_swiglu_ffn=True)
    given.save_pretrained(tmp_path / "model")
    main([str(tmp_path / "model"), "--to", "huggingface", "--out", str(tmp_path / "back")])
    back = transformers.AutoModel.from_pretrained(tmp_path / "back").state_dict()
    for name, tensor in given.state_dict().items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_a_trained_model_goes_to_transformers(tmp_path, capsys):
    """dinojax_vitt: of the family of DINO, with a mean and an interpolation of its own."""
    main(["dinojax_vitt", "--to", "huggingface", "--out", str(tmp_path / "vitt")])
    assert "note: positions are resized as in upstream's code" in capsys.readouterr().out
    model = load_pretrained("dinojax_vitt")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "vitt", add_pooling_layer=False).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "vitt")
    for shape in ((48, 64, 3), (41, 32, 3), (32, 32, 3)):
        photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))
        images = dinojax.preprocess(photo, model, size=None)
        pixels = np.asarray(processor(photo, return_tensors="np")["pixel_values"])
        np.testing.assert_allclose(pixels.transpose(0, 2, 3, 1), images, rtol=0, atol=1e-6)
        np.testing.assert_allclose(tokens(model, images), outputs(theirs, images).last_hidden_state, rtol=0, atol=3e-5)


def test_what_transformers_does_not_have_is_refused(tmp_path, capsys):
    from flax import nnx

    config = dinojax.ViTConfig(
        img_size=28, patch_size=14, embed_dim=32, depth=1, num_heads=2, init_values=1.0, mlp_ratio=2.5
    )
    dinojax.save(dinojax.VisionTransformer(config, rngs=nnx.Rngs(0)), tmp_path / "odd")
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for out, message in (("new", "mlp_ratio 2.5: --to torch or"), ("there", "exists; remove it or name another")):
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path / "odd"), "--to", "huggingface", "--out", str(tmp_path / out)])
        assert caught.value.code == 2 and message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def changed(folder: Path, parent: Path, **settings: object) -> Path:
    """A copy of a folder with other settings."""
    copy = parent / "changed"
    copy.mkdir(parents=True)
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text()) | settings
    (copy / "config.json").write_text(json.dumps(config))
    return copy
