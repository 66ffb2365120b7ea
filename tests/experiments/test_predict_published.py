"""`predict` with published heads: classes and depth of photos, from local files of a small model."""

import csv
import json
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image

import dinojax
from converters import heads, load_pretrained, pretrained
from converters.sources import HEAD_SOURCES
from dinojax import VARIANTS, UserError, ViTConfig
from dinojax.heads.imagenet import imagenet_classes
from experiments import predict
from experiments.features.backbones import load_backbone
from experiments.published.depth import units_per_metre
from tests.support import torch_heads

torch = pytest.importorskip("torch")

TINY = ViTConfig(img_size=70, patch_size=14, embed_dim=64, depth=12, num_heads=1, init_values=1.0)


@pytest.fixture
def place(monkeypatch, tmp_path):
    """Two photos, and files of a small backbone, of a classifier and of a depth head."""
    sources = {("tiny_vit14", head): HEAD_SOURCES["dinov2_vits14", head] for head in ("nyu-linear", "imagenet-linear")}
    for module in (heads, pretrained):
        monkeypatch.setattr(module, "VARIANTS", MappingProxyType({**VARIANTS, "tiny_vit14": TINY}))
    monkeypatch.setattr(heads, "HEAD_SOURCES", MappingProxyType({**HEAD_SOURCES, **sources}))
    model = torch_heads.randomize(torch_heads.dpt(64, 12, 1, image_size=70))
    torch.save(torch_heads.backbone_state(model), tmp_path / "backbone.pth")
    torch.save(torch.nn.Linear(128, 1000).state_dict(), tmp_path / "classes.pth")
    weight, bias = torch.randn(256, 128, 1, 1) / 11, torch.randn(256)
    state = {"decode_head.conv_depth.weight": weight, "decode_head.conv_depth.bias": bias}
    torch.save({"state_dict": state}, tmp_path / "depth.pth")
    random = np.random.default_rng(0)
    for name, shape in (("a.png", (30, 45)), ("sub/a.png", (61, 40))):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(tmp_path / "photos" / name)
    return tmp_path


def arguments(place, head, *more) -> list[str]:
    file = "classes.pth" if head.startswith("imagenet") else "depth.pth"
    return [
        str(place / "photos"), "--weights", "tiny_vit14", "--head", head, "--out", str(place / "out"),
        "--backbone-weights", str(place / "backbone.pth"), "--head-weights", str(place / file), *more,
    ]  # fmt: skip


def test_the_five_likeliest_classes_are_printed_written_and_drawn(place, capsys):
    predict.main(arguments(place, "imagenet-linear", "--image-size", "28"))
    with (place / "out/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["rank"]) for row in rows] == [
        (f, str(k)) for f in ("a.png", "sub/a.png") for k in range(1, 6)
    ]
    model = load_pretrained(
        "tiny_vit14", head="imagenet-linear", weights=place / "backbone.pth", head_weights=place / "classes.pth"
    )
    # The official evaluation: shorter side 256/224 of the crop, bicubic.
    image = Image.open(place / "photos/a.png").resize((48, 32), Image.Resampling.BICUBIC).crop((10, 2, 38, 30))
    logits = np.asarray(model(dinojax.normalize(np.asarray(image)[None], model)), np.float64)[0]
    shares = np.exp(logits) / np.exp(logits).sum()
    for row, index in zip(rows[:5], np.argsort(-shares)):
        assert row["class"] == imagenet_classes()[index]
        assert float(row["probability"]) == pytest.approx(shares[index], abs=2e-6)
    said = capsys.readouterr().out
    assert said.count(rows[0]["class"].split(",")[0]) >= 1 and "sub/a.png" in said
    assert min(np.asarray(Image.open(place / "out/predictions.png")).shape[:2]) > 200


@pytest.mark.slow  # compiles a DPT head
def test_depth_is_written_in_metres_and_in_16_bits_at_the_size_of_the_photo(place, capsys):
    predict.main(arguments(place, "nyu-linear"))
    model = load_pretrained(
        "tiny_vit14", head="nyu-linear", weights=place / "backbone.pth", head_weights=place / "depth.pth"
    )
    for name, file in (("a", "a.png"), ("a_2", "sub/a.png")):
        pixels = np.asarray(Image.open(place / "photos" / file))
        expected = model(dinojax.normalize(pixels[None], model))[0]
        depth = np.load(place / f"out/{name}_depth.npy")
        np.testing.assert_allclose(depth, expected, rtol=0, atol=3e-5)
        counts = np.asarray(Image.open(place / f"out/{name}_depth.png"))
        assert counts.dtype in (np.uint16, np.int32) and counts.shape == pixels.shape[:2]
        assert np.abs(counts / 1000 - depth).max() <= 0.00051
    assert json.loads((place / "out/config.json").read_text())["png_units_per_metre"] == 1000
    assert min(np.asarray(Image.open(place / "out/depth.png")).shape[:2]) > 200
    assert "a_2  " in capsys.readouterr().out


def test_a_resized_photo_gets_a_map_of_its_own_size(place):
    predict.main(arguments(place, "nyu-linear", "--image-size", "28"))
    assert np.load(place / "out/a_2_depth.npy").shape == (61, 40)


def test_80_metres_do_not_fit_millimetres():
    assert units_per_metre(10) == 1000 and units_per_metre(65.535) == 1000 and units_per_metre(80) == 256


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "nothing says what to predict"),
        (("--head", "nyu-dpt"), "--head nyu-dpt goes on a model; name it"),
        (("--weights", "dinov2_vits14_reg", "--head", "nyu-dpt"), "no depth heads were published for models with reg"),
        (("--run", "somewhere", "--head", "nyu-dpt"), "--head is for published heads"),
        (("--weights", "dinov2_vits14_lx", "--head", "imagenet-linear"), "no model is called 'dinov2_vits14_lx'"),
    ],
)
def test_what_cannot_be_predicted_is_one_sentence(place, capsys, given, message):
    with pytest.raises(SystemExit) as stop:
        predict.main([str(place / "photos/a.png"), *given, "--out", str(place / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (place / "out").exists()


def test_other_commands_do_not_take_a_classifier():
    with pytest.raises(UserError, match=r"dinov2_vits14_lc is a classifier.*the model under it is dinov2_vits14$"):
        load_backbone("dinov2_vits14_lc", seed=0, cache_dir=None)
