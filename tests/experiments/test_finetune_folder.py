"""A folder of images to a tuned classifier: what is kept was evaluated; resumed equals uninterrupted; mistakes."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss

import dinojax
from dinojax import Preprocessing, UserError, VisionTransformer, ViTConfig
from dinojax.finetune import MODES
from experiments import finetune_folder, predict
from experiments.finetuning import loop as finetune_run
from experiments.finetuning.config import FinetuneConfig
from experiments.finetuning.loop import Training, finetune, make_task
from experiments.runs.log import read_log
from experiments.runs.settings import create

ROOT = Path(__file__).parents[2]
TINY = ViTConfig(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
CLASSES = {"blue leaf": (30, 40, 220), "green": (40, 200, 60), "rot": (230, 30, 30)}
COUNTS = {"training": (8, 6, 3), "validation": (4, 3, 2)}


def draw(folder, counts, seed):
    """Photos of sizes of their own, each class of a colour."""
    rng = np.random.default_rng(seed)
    for (name, color), count in zip(CLASSES.items(), counts):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            height, width = rng.integers(18, 30, 2)
            noise = rng.integers(-25, 26, (height, width, 3))
            pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("finetune")
    for seed, (split, counts) in enumerate(COUNTS.items()):
        draw(place / "leaves" / split, counts, seed)
    preprocessing = Preprocessing(image_size=16, patch_size=TINY.patch_size)
    dinojax.save(VisionTransformer(TINY, rngs=nnx.Rngs(0), preprocessing=preprocessing), place / "weights")
    return place


def config(place, **changes):
    options = {"weights": str(place / "weights"), "cache_dir": place / "cache", "epochs": 3, "batch_size": 8}
    return create(FinetuneConfig, **{"folder": place / "leaves", "seed": 1, **options, **changes})


@pytest.fixture(scope="module")
def every_mode(place):
    return finetune(config(place, mode="all", learning_rate=0.01, out=place / "all")).folder


def rows(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_times(folder):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_log(folder)]


def test_every_mode_is_evaluated_as_scikit_learn_evaluates_its_predictions(every_mode):
    found = json.loads((every_mode / "metrics.json").read_text())
    assert tuple(found) == MODES
    total = sum(x.size for x in load_file(every_mode / "llrd" / "model" / "model.safetensors").values())
    head, factors = 16 * 3 + 3, 2 * 8 * ((16 + 3 * 16) + (16 + 16))  # two blocks, rank 8, qkv and proj
    counts = {"linear": head, "finetune": total + head, "llrd": total + head, "lora": factors + head}
    for mode, one in found.items():
        said = rows(every_mode / mode / "predictions.csv")
        true, predicted = [row["true"] for row in said], [row["predicted"] for row in said]
        assert len(said) == 9 and {row["split"] for row in said} == {"validation"}
        assert one["validation"]["accuracy"] == accuracy_score(true, predicted)
        assert one["validation"]["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted))
        assert one["trainable_parameters"] == counts[mode]
        best = without_times(every_mode / mode)[one["best_epoch"] - 1]
        assert best["validation_accuracy"] == pytest.approx(one["validation"]["accuracy"])
        assert best["score"] == max(record["score"] for record in without_times(every_mode / mode))
        assert "no third split" in one["bias"]
    table = (every_mode / "results.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == list(MODES)
    assert f"{total + head:,}" in table[3]
    for file in ("curves.png", *(f"{mode}/confusion.png" for mode in MODES)):
        with Image.open(every_mode / file) as figure:
            assert figure.size[0] > 600


def test_colours_are_learnt(every_mode):
    """The head alone has the three colours within three epochs, which chance (4/9) would not."""
    found = json.loads((every_mode / "metrics.json").read_text())
    assert max(one["validation"]["accuracy"] for one in found.values()) == 1


def test_predict_says_of_each_image_what_the_training_said(every_mode, place, tmp_path):
    for mode in ("linear", "lora"):
        out = tmp_path / mode
        options = {"--run": every_mode / mode, "--out": out, "--cache-dir": place / "cache"}
        predict.main([str(place / "leaves" / "validation"), *(str(word) for pair in options.items() for word in pair)])
        said = {f"validation/{row['file']}": row for row in rows(out / "predictions.csv")}
        for row in rows(every_mode / mode / "predictions.csv"):
            assert said[row["id"]]["class"] == row["predicted"]
            assert float(said[row["id"]]["probability"]) == pytest.approx(float(row["probability"]), abs=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(every_mode, place, tmp_path, monkeypatch):
    validate = Training._validate

    def cut_off(training, state):
        if int(state.step) == 6:  # after the second epoch's steps, before its checkpoint
            raise KeyboardInterrupt
        return validate(training, state)

    settings = config(place, mode="llrd", learning_rate=0.01, out=tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(Training, "_validate", cut_off)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings)
    assert not (tmp_path / "run" / "llrd" / "metrics.json").exists()
    finetune(settings)
    one, other = tmp_path / "run" / "llrd", every_mode / "llrd"
    assert without_times(one) == without_times(other)
    for file in ("model/model.safetensors", "finetuned.safetensors"):
        arrays, expected = load_file(one / file), load_file(other / file)
        assert arrays.keys() == expected.keys()
        assert all(np.array_equal(arrays[name], expected[name]) for name in arrays)


def test_a_finished_mode_is_left_alone_and_another_joins_its_table(place, tmp_path, capsys):
    out = tmp_path / "run"
    finetune(config(place, out=out))
    written = (out / "linear" / "metrics.json").stat().st_mtime_ns
    finetune(config(place, mode="lora", out=out))
    finetune(config(place, out=out))
    assert "linear is finished" in capsys.readouterr().out
    assert (out / "linear" / "metrics.json").stat().st_mtime_ns == written
    assert list(json.loads((out / "metrics.json").read_text())) == ["linear", "lora"]
    with pytest.raises(UserError, match=r"is a run with epochs = 3, not 4; give the same settings"):
        finetune(config(place, epochs=4, out=out))


def test_another_data_set_of_the_same_name_is_not_taken_for_this_one(every_mode, place, tmp_path, capsys):
    """Neither a table for other images, nor a training resumed on them."""
    other = tmp_path / "leaves"
    shutil.copytree(place / "leaves", other)
    default = [config(place, folder=folder).folder for folder in (place / "leaves", other)]
    assert default[0] != default[1] and {folder.name[:7] for folder in default} == {"leaves-"}
    arguments = {"mode": "linear", "learning_rate": 0.01, "out": every_mode}
    finetune(config(place, folder=other, **arguments))  # a copy is the same data
    assert "linear is finished" in capsys.readouterr().out
    photo = next((other / "training" / "green").iterdir())
    photo.write_bytes((other / "training" / "rot" / "0.png").read_bytes())
    with pytest.raises(UserError, match=r"the train images are not those that .*/linear was made with \(17 then, 17"):
        finetune(config(place, folder=other, **arguments))
    for split in COUNTS:
        (other / split / "rot").rename(other / split / "rust")
    with pytest.raises(
        UserError, match=r"is a run on other classes \(blue leaf, green, rot, not blue leaf, green, rust"
    ):
        finetune(config(place, folder=other, **arguments))


def test_features_and_images_give_the_same_logits(place, tmp_path):
    """For one head on a frozen backbone, both ways; and its loss is scikit-learn's."""
    trainings = []
    for augment in (False, True):
        settings = config(place, augment=augment).of_mode("linear")
        trainings.append(Training(settings, make_task(settings), tmp_path / str(augment)))
    split = trainings[0].task.images.validation
    kernel = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    states = [training.init() for training in trainings]
    for state in states:
        state.trainable["head"]["kernel"][...] = kernel
    one, other = (training.evaluate(state.trainable, split) for training, state in zip(trainings, states))
    np.testing.assert_allclose(one, other, atol=2e-5)
    numbers = trainings[0]._validate(states[0])
    chances = np.exp(one - one.max(1, keepdims=True)).astype(np.float64)
    expected = log_loss(split.labels, chances / chances.sum(1, keepdims=True))
    assert numbers["validation_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow  # compiles the same training twice, once in a process with two devices
def test_two_devices_train_as_one(place, tmp_path):
    finetune(config(place, mode="llrd", epochs=2, out=tmp_path / "one"))
    options = {"--mode": "llrd", "--weights": place / "weights", "--epochs": 2, "--batch-size": 8, "--seed": 1}
    options |= {"--out": tmp_path / "two", "--cache-dir": place / "cache"}
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    command = [sys.executable, "-m", "experiments.finetune_folder", str(place / "leaves")]
    command += [str(word) for pair in options.items() for word in pair]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "on 2 × cpu" in done.stdout, done.stderr
    for ours, theirs in zip(without_times(tmp_path / "two" / "llrd"), without_times(tmp_path / "one" / "llrd")):
        assert ours == pytest.approx(theirs, rel=2e-5)


def test_a_test_split_is_evaluated_once_and_no_bias_is_named(place, tmp_path):
    leaves = tmp_path / "leaves"
    shutil.copytree(place / "leaves", leaves)
    draw(leaves / "test", (2, 2, 2), seed=7)
    out = finetune(config(place, folder=leaves, epochs=1, out=tmp_path / "run")).folder
    one = json.loads((out / "metrics.json").read_text())["linear"]
    assert one["bias"] is None and one["test"]["images"] == 6
    assert "test accuracy" in (out / "results.md").read_text()
    assert {row["split"] for row in rows(out / "linear" / "predictions.csv")} == {"validation", "test"}


def test_early_stop_and_class_balance(place, tmp_path):
    """A rate of next to nothing never gets better than its first epoch."""
    still = {"learning_rate": 1e-12, "epochs": 9, "early_stop": 2}
    out = finetune(config(place, balance="sampling", out=tmp_path / "run", **still)).folder
    assert [record["epoch"] for record in read_log(out / "linear")] == [1, 2, 3]
    assert json.loads((out / "metrics.json").read_text())["linear"]["best_epoch"] == 1


def test_the_reported_protocol_is_the_articles(place):
    settings = config(place, mode="all", protocol="reported", epochs=20)
    modes = [settings.of_mode(mode) for mode in ("linear", "finetune")]
    linear, tuned = (mode.training for mode in modes)
    assert (linear.learning_rate, linear.schedule, modes[0].views.augment) == (5e-4, "step", True)
    assert (tuned.learning_rate, tuned.schedule, modes[1].views.augment) == (1e-4, "constant", True)
    assert {one.select for one in (linear, tuned)} == {"loss"}
    assert {mode.views.interpolation for mode in modes} == {"bilinear"}
    rate = finetune_run._schedule(linear, steps_per_epoch=3)
    np.testing.assert_allclose([rate(29), rate(30), rate(59)], [5e-4, 5e-5, 5e-5], rtol=1e-6)


def test_a_run_folder_of_an_earlier_version_is_known(every_mode, place, tmp_path, capsys):
    """The protocol `reported` was called `seed`, and config.json was that of one flat dataclass."""
    out = tmp_path / "run"
    shutil.copytree(every_mode, out)
    path = out / "linear" / "config.json"
    kept = json.loads(path.read_text())
    del kept["document_sha256"]
    assert kept["protocol"] == "recommended" and kept["image_size"] is None and kept["crop_scale"] == [0.08, 1.0]
    finetune(config(place, learning_rate=0.01, out=out))
    assert "linear is finished" in capsys.readouterr().out
    settings = config(place, learning_rate=0.01, protocol="reported", out=out)
    with pytest.raises(UserError, match="is a run with protocol = recommended, not reported"):
        finetune(settings)
    path.write_text(json.dumps(kept | {"augment": True, "interpolation": "bilinear", "select": "loss"}
                               | {"protocol": "seed"}))  # fmt: skip
    finetune(settings)
    assert "linear is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["missing"], "missing: there is no such folder"),
        (["DATA", "--data", "other"], "leaves and --data other name different images; give one of them"),
        (["DATA", "--epochs", "0"], "--epochs 0 is not a positive number"),
        (["DATA", "--resize", "8"], "--resize 8 is less than the 16 px that are cut out of it"),
        (["DATA", "--image-size", "2"], "--image-size 2 is smaller than one patch"),
        (["DATA", "--crop-scale", "0.5", "0.2"], "--crop-scale 0.5 0.2 is not two shares of the image"),
        (["DATA", "--weights", "elsewhere"], "elsewhere"),
        (["DATA", "--val-fraction", "0.5"], "--val-fraction 0.5"),
        (["DATA", "--lora-rank", "-1", "--mode", "lora"], "--lora-rank -1 is not a positive number"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(place, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    flags = [str(place / "leaves") if flag == "DATA" else flag for flag in flags]
    flags += [] if "--weights" in flags else ["--weights", str(place / "weights")]
    with pytest.raises(SystemExit) as stop:
        finetune_folder.main([*flags, "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["linear", "finetune"])
def test_a_file_that_is_no_image_is_named(place, tmp_path, capsys, mode):
    leaves = tmp_path / "leaves"
    draw(leaves / "train", (3, 3, 3), seed=3)
    draw(leaves / "val", (2, 2, 2), seed=4)
    (leaves / "train" / "green" / "1.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:
        finetune_folder.main(
            [str(leaves), "--mode", mode, "--weights", str(place / "weights"), "--out", str(tmp_path / "out")]
        )
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "green/1.png is not a readable image" in last
