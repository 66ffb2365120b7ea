"""The whole command: on tiny data to the last file, and one sentence where it cannot run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

import dinojax
from dinojax import UserError, VisionTransformer, ViTConfig
from experiments.cifar10_probe import Config, main, run
from experiments.harness.backbones import load_backbone

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def weights(tmp_path):
    config = ViTConfig(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    return dinojax.save(VisionTransformer(config, rngs=nnx.Rngs(0)), tmp_path / "weights")


@pytest.fixture
def config(tmp_path, weights):
    return Config(
        data="digits",
        weights=str(weights),
        image_size=16,
        max_train=300,
        max_test=60,
        epochs=3,
        out=tmp_path / "run",
        cache_dir=tmp_path / "cache",
    )


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_the_command_ends_in_a_table_and_all_artifacts(config, capsys):
    result = run(config)
    said = capsys.readouterr().out
    assert files(result.folder) == {
        "config.json", "curves.png", "linear_head.safetensors", "metrics.json", "predictions_test.png",
        "predictions_train.png",
    }  # fmt: skip
    assert f"{100 * result.linear_test_accuracy:.2f}" in said
    assert f"{100 * result.knn_accuracy[20]:.2f}" in said
    assert "held-out training images" in said
    assert "UNTRAINED" not in said
    metrics = json.loads((result.folder / "metrics.json").read_text())
    assert metrics["linear"]["test_accuracy"] == result.linear_test_accuracy
    assert metrics["knn"]["test_accuracy"]["20"] == result.knn_accuracy[20] > 0.15
    assert metrics["dataset"]["train_images"] == 300
    assert json.loads((result.folder / "config.json").read_text())["image_size"] == 16
    for name in files(result.folder):
        if name.endswith(".png"):
            pixels = np.asarray(Image.open(result.folder / name).convert("L"))
            assert min(pixels.shape) > 400
            assert pixels.std() > 10


def test_the_saved_head_gives_the_accuracy_that_is_reported(config, weights):
    result = run(config)
    head = load_file(result.folder / "linear_head.safetensors")
    from experiments.harness.datasets import load_dataset
    from experiments.harness.features import load_square

    test = load_dataset("digits", max_train=300, max_test=60).test
    pixels = np.stack([load_square(test, i, 16) for i in range(60)]) / 255
    images = ((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).astype(np.float32)
    cls_token = dinojax.load(weights)(images).cls_token
    accuracy = np.mean(np.argmax(cls_token @ head["kernel"] + head["bias"], axis=1) == test.labels)
    assert accuracy == pytest.approx(result.linear_test_accuracy)


def test_the_same_command_gives_the_same_numbers_and_a_run_folder_is_used_again(config):
    first = run(config)
    (config.out / "notes.txt").write_text("mine")
    second = run(config)
    assert first.linear_test_accuracy == second.linear_test_accuracy
    assert first.metrics["linear"] == second.metrics["linear"]
    assert (config.out / "notes.txt").read_text() == "mine"


def test_random_weights_are_called_an_untrained_baseline(config, capsys):
    import dataclasses

    small = dataclasses.replace(config, weights="random:dino_vitt16", max_train=40, max_test=20)
    result = run(small)
    assert result.metrics["untrained_baseline"]
    assert "UNTRAINED BASELINE" in capsys.readouterr().out
    assert list(result.knn_accuracy) == [10, 20]


def test_random_weights_follow_the_seed_and_the_name():
    model = load_backbone("random:dino_vitt16", seed=3, cache_dir=Path("unused"))
    again = load_backbone("random:dino_vitt16", seed=3, cache_dir=Path("unused"))
    other = load_backbone("random:dino_vitt16", seed=4, cache_dir=Path("unused"))
    assert model.config == dinojax.VARIANTS["dino_vitt16"]
    leaves = [jax.tree.leaves(nnx.state(m))[-1] for m in (model, again, other)]
    assert (leaves[0] == leaves[1]).all() and not (leaves[0] == leaves[2]).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "missing/folder"], "--data missing/folder: there is no such folder"),
        (["--weights", "missing.pth"], "--weights missing.pth: there is no such file"),
        (["--weights", "random:dino_vitx"], "'dino_vitx' is none of dino_vitt16, "),
        (["--max-train", "5"], "--max-train 5 is less than one image for each of the 10 classes"),
        (["--epochs", "0"], "--epochs 0 is not a positive number"),
        (["--heldout-fraction", "1"], "--heldout-fraction 1.0 is not between 0 and 1"),
        (["--image-size", "3"], "--image-size 3 is smaller than one patch"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(config, capsys, flags, message):
    given = ["--data", "digits", "--weights", config.weights, "--out", str(config.out), "--image-size", "16"]
    with pytest.raises(SystemExit) as stop:
        main([*given, "--cache-dir", str(config.cache_dir), *flags])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not config.out.exists() and not config.cache_dir.exists()
    assert files(config.out.parent) == {"weights"}


def test_a_corrupt_image_stops_the_run_by_name_and_leaves_no_run_folder(config, tmp_path, capsys):
    for split, name in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "data" / "train" / "b" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    flags = ["--weights", config.weights, "--image-size", "16", "--out", str(config.out)]
    with pytest.raises(SystemExit) as stop:
        main(["--data", str(tmp_path / "data"), "--cache-dir", str(config.cache_dir), *flags])
    assert stop.value.code == 2
    assert "train/b/2.png is no readable image" in capsys.readouterr().err
    assert not config.out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_folders_are_not_written_to(config):
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files; name a new folder"):
        run(config)
    assert files(config.out) == {"thesis.txt"}


def test_help_teaches_and_loads_nothing_heavy():
    code = (
        "import sys, runpy\nsys.argv = ['cifar10_probe', '--help']\n"
        "try: runpy.run_module('experiments.cifar10_probe', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'tensorflow', 'tensorflow_datasets', 'matplotlib', 'sklearn', 'scipy.stats', 'PIL'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY, env=environment
    )
    assert "loaded: []" in done.stdout
    for word in ("--data", "--weights", "--image-size", "--max-train", "digits", "random"):
        assert word in done.stdout
