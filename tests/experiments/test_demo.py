"""The demo from command to figure, and that its run folder serves as weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.demo import Config, run
from experiments.features.backbones import load_backbone


@pytest.mark.slow  # compiles and trains the whole demo: a minute
def test_the_demo_trains_draws_and_leaves_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # of the feature cache
    accuracies = run(Config(epochs=2, out=tmp_path / "demo")).test_knn_accuracy
    said = capsys.readouterr().out
    assert f"{100 * accuracies['random_init']:.1f} % before, {100 * accuracies['teacher']:.1f} % after" in said
    assert accuracies == json.loads((tmp_path / "demo" / "result.json").read_text())["test_knn_accuracy"]
    with Image.open(tmp_path / "demo" / "attention.png") as figure:
        assert figure.width > 900 and np.asarray(figure.convert("L")).std() > 10
    backbone = load_backbone(str(tmp_path / "demo"), seed=0, cache_dir=Path())
    assert backbone.model.config.embed_dim == 192 and backbone.image_size == 16
    assert 0 < backbone.normalisation[0][0] < 1
