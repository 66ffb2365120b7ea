"""The model inside the package: whole, the architecture of its name, with its normalisation, and told of truthfully."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import dinojax
from converters import load_pretrained
from converters.pretrained import fetch
from dinojax import UserError
from dinojax.models.files import named_parameters, shipped_folder
from experiments.data.digits import load_digits
from experiments.features.backbones import load_backbone
from experiments.features.extractor import FeatureExtractor

NAME = "dinojax_vitt"
FOLDER = shipped_folder(NAME)
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "dino_cpu_cifar10_jpeg.json"


def test_it_loads_without_a_cache_or_a_network(tmp_path):
    model = load_pretrained(NAME, cache_dir=tmp_path)
    assert model.config == dinojax.VARIANTS[NAME]
    assert not list(tmp_path.iterdir())
    assert {array.dtype for array in named_parameters(model).values()} == {np.dtype(np.float32)}
    with pytest.raises(UserError, match="dinojax_vitt comes with dinojax"):
        fetch(NAME, tmp_path)


def test_it_is_small():
    assert (FOLDER / "model.safetensors").stat().st_size < 4 * 2**20


def test_it_brings_its_own_normalisation(tmp_path):
    backbone = load_backbone(NAME, seed=0, cache_dir=tmp_path)
    source = json.loads((FOLDER / "config.json").read_text())["source"]
    assert backbone.normalisation == (tuple(source["mean"]), tuple(source["std"]))
    assert backbone.image_size == source["image_size"] == 32


def test_preprocess_gives_the_features_of_the_commands(tmp_path):
    """The commands resize and normalise on their own way, inside jit."""
    backbone = load_backbone(NAME, seed=0, cache_dir=tmp_path)
    split = load_digits().test.subset(np.arange(20))
    options = {"normalisation": backbone.normalisation, "image_size": backbone.image_size, "cache_dir": tmp_path}
    (features,) = FeatureExtractor(backbone.model, **options).extract([split])
    images = dinojax.preprocess([split.read(i) for i in range(20)], backbone.model, size=None)
    found = dinojax.embed(backbone.model, images)
    for array, expected in ((found.cls, features.vectors()), (found.mean_patch, features.mean_patch)):
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6 * np.abs(expected).max())  # 5.6e-7 measured


def test_its_card_tells_what_was_measured():
    """Every accuracy on the card is one of the committed results, rounded."""
    card, results = (FOLDER / "README.md").read_text(), json.loads(RESULTS.read_text())
    rows = results["evaluation"]["rows"] + results["raw_pixels"]["rows"]
    measured = {f"{100 * row['accuracy']:.1f}" for row in rows}
    table = [line for line in card.splitlines() if line.startswith("|")][2:]
    shown = {number for line in table for number in re.findall(r"\b\d\d\.\d\b", line)}
    assert len(shown) > 8 and shown <= measured
