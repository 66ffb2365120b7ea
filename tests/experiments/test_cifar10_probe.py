"""The whole command: on tiny data to the last file, and one sentence where it cannot run."""

import csv
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
from experiments import evaluate, finetune_folder
from experiments.cifar10_probe import Config, main, run
from experiments.data.load import load_dataset
from experiments.data.splits import Split
from experiments.data.squares import load_square
from experiments.data.views import augmented
from experiments.features.backbones import load_backbone
from experiments.runs.command_line import command_line
from experiments.runs.settings import create, replace
from experiments.summaries.results import read_runs

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def weights(tmp_path):
    config = ViTConfig(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    return dinojax.save(VisionTransformer(config, rngs=nnx.Rngs(0)), tmp_path / "weights")


@pytest.fixture
def config(tmp_path, weights):
    return create(
        Config,
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


def accuracy_of(result, name):
    return result.metrics["classifiers"][name]["test"]["accuracy"]


def test_the_command_ends_in_a_table_and_all_artifacts(config, capsys):
    result = run(config)
    said = capsys.readouterr().out
    assert files(result.folder) == {
        "classifiers.json", "config.json", "confusion_knn.png", "confusion_linear.png", "curves_linear.png",
        "examples_knn_test.png", "examples_knn_train.png", "examples_linear_test.png", "examples_linear_train.png",
        "linear.safetensors", "map.png", "metrics.json", "metrics.png", "predictions_knn.csv",
        "predictions_linear.csv", "result.json", "training_features.safetensors",
    }  # fmt: skip
    assert " of 3, selected on held-out training images" in said
    assert "UNTRAINED" not in said and "selected on the test set" not in said
    metrics = json.loads((result.folder / "metrics.json").read_text())
    for name, line in (("knn", "k-NN, weighted cosine"), ("linear", "linear probe")):
        found = metrics["classifiers"][name]
        (shown,) = (row for row in said.splitlines() if row.startswith(line))
        assert f"{100 * found['test']['accuracy']:.2f}" in shown and f"{100 * found['train']['accuracy']:.2f}" in shown
        assert found["train_test_gap"] == pytest.approx(found["train"]["accuracy"] - found["test"]["accuracy"])
        assert found["test"]["accuracy"] > 0.15
        assert metrics["cost"][name]["fit"]["seconds"] > 0
    assert list(metrics["classifiers"]["knn"]["test_accuracy_by_k"]) == ["10", "20", "100", "200"]
    assert metrics["dataset"]["train_images"] == 300
    assert json.loads((result.folder / "config.json").read_text())["image_size"] == 16
    for name in files(result.folder):
        if name.endswith(".png"):
            pixels = np.asarray(Image.open(result.folder / name).convert("L"))
            assert min(pixels.shape) > 400
            assert pixels.std() > 10


def test_the_result_has_the_numbers_of_the_metrics_and_is_summarised(config):
    result = run(replace(config, classifiers="all", mlp_epochs=2, sweep_steps=20, figures=False))
    document = json.loads((result.folder / "result.json").read_text())
    rows = {row["probe"]: row for row in document["rows"]}
    found = result.metrics["classifiers"]
    assert rows.keys() == {"knn_10", "knn_20", "knn_100", "knn_200", "5_shot_1nn", "5_shot_knn", "5_shot_linear"} | (
        found.keys() - {"knn"}
    )
    for name in found:
        row = rows["knn_20" if name == "knn" else name]
        assert row["accuracy"] == found[name]["test"]["accuracy"]
        assert row["features"] == ("chosen" if name == "sweep" else "cls")
    assert rows["logistic"]["train_accuracy"] == pytest.approx(found["logistic"]["train"]["accuracy"])
    assert rows["knn_20"]["train_accuracy"] is None
    few = result.metrics["few_shot"]["test_accuracy"]
    assert {name: rows[f"5_shot_{name}"]["accuracies"] for name in few} == few
    (summarised,) = read_runs([result.folder])
    assert summarised.accuracies["model", "cls", "svc"] == found["svc"]["test"]["accuracy"]


def test_the_saved_head_gives_the_accuracy_that_is_reported(config, weights):
    result = run(replace(config, figures=False))
    head = load_file(result.folder / "linear.safetensors")
    test = load_dataset("digits", max_train=300, max_test=60).test
    pixels = np.stack([load_square(test, i, 16) for i in range(60)]) / 255
    images = ((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).astype(np.float32)
    cls_token = np.asarray(dinojax.load(weights)(images).cls_token)
    accuracy = np.mean(np.argmax(cls_token @ head["kernel"] + head["bias"], axis=1) == test.labels)
    assert accuracy == pytest.approx(accuracy_of(result, "linear"))


def test_a_run_folder_gives_its_teacher_with_the_normalisation_it_was_trained_with(config, tmp_path):
    own = dinojax.Preprocessing((0.3, 0.5, 0.6), (0.4, 0.2, 0.3), image_size=16, patch_size=4)
    shape = ViTConfig(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    for seed, network in enumerate(("teacher", "student")):
        model = VisionTransformer(shape, rngs=nnx.Rngs(seed), preprocessing=own)
        dinojax.save(model, tmp_path / "training" / network)
    result = run(replace(config, weights=str(tmp_path / "training"), figures=False))
    head = load_file(result.folder / "linear.safetensors")
    test = load_dataset("digits", max_train=300, max_test=60).test
    pixels = np.stack([load_square(test, i, 16) for i in range(60)]) / 255
    teacher = dinojax.load(tmp_path / "training" / "teacher")
    cls_token = np.asarray(teacher(((pixels - own.mean) / own.std).astype(np.float32)).cls_token)
    accuracy = np.mean(np.argmax(cls_token @ head["kernel"] + head["bias"], axis=1) == test.labels)
    assert accuracy == pytest.approx(accuracy_of(result, "linear"))
    index = json.loads((result.folder / "classifiers.json").read_text())
    assert index["weights"] == str(tmp_path / "training" / "teacher")
    assert index["normalisation"] == [list(own.mean), list(own.std)]


def test_the_stored_predictions_give_the_accuracy_that_is_reported(config):
    result = run(replace(config, figures=False))
    for name in ("knn", "linear"):
        with (result.folder / f"predictions_{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["id"] for row in rows[:300]] == load_dataset("digits", max_train=300).train.ids
        for part, count in (("train", 300), ("test", 60)):
            hits = [row["true"] == row["predicted"] for row in rows if row["split"] == part]
            assert len(hits) == count
            assert np.mean(hits) == pytest.approx(result.metrics["classifiers"][name][part]["accuracy"])


def test_the_same_command_gives_the_same_numbers_and_a_run_folder_is_used_again(config):
    everything = replace(config, classifiers="all", mlp_epochs=2, sweep_steps=20, figures=False)
    first = run(everything)
    before = {
        path.name: path.read_bytes() for path in config.run.out.iterdir() if path.suffix in (".safetensors", ".csv")
    }
    (config.run.out / "notes.txt").write_text("mine")
    second = run(everything)
    assert len(first.metrics["classifiers"]) == 8 and len(first.metrics["few_shot"]["test_accuracy"]) == 3
    for key in first.metrics.keys() - {"cost", "features_seconds"}:
        assert first.metrics[key] == second.metrics[key], key
    assert before == {name: (config.run.out / name).read_bytes() for name in before}
    assert (config.run.out / "notes.txt").read_text() == "mine"


@pytest.mark.slow  # fits all nine classifiers, the sweep and the SVC among them
def test_shuffled_labels_are_learnt_by_no_classifier(config, tmp_path):
    """A leak of any test image into any fit would be seen: the labels have nothing to do with the images."""
    dataset = load_dataset("digits", max_train=400, max_test=300)
    for split in (dataset.train, dataset.test):
        labels = np.random.default_rng(7).permutation(split.labels)
        for i, label in enumerate(labels):
            folder = tmp_path / "data" / split.name / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.read(i)).save(folder / f"{i}.png")
    options = {"data": str(tmp_path / "data"), "classifiers": "all", "max_train": None, "max_test": None}
    result = run(replace(config, **options, mlp_epochs=5, sweep_steps=100, figures=False))
    accuracies = {name: accuracy_of(result, name) for name in result.metrics["classifiers"]}
    accuracies |= {f"few_shot {k}": np.mean(v) for k, v in result.metrics["few_shot"]["test_accuracy"].items()}
    assert len(accuracies) == 11
    for name, accuracy in accuracies.items():
        assert 0.03 < accuracy < 0.17, name  # four deviations about 10 %


def test_what_is_selected_on_the_test_set_is_called_so(config, capsys):
    options = {"classifiers": "knn,linear,mlp,logistic", "mlp_epochs": 3, "protocol": "reported", "figures": False}
    metrics = run(replace(config, **options)).metrics
    said = capsys.readouterr().out
    assert "PROTOCOL reported: epochs and heads are selected on the test set" in said
    for name, title in (("linear", "linear probe"), ("mlp", "MLP, file order")):
        (row,) = (row for row in said.splitlines() if row.startswith(title))
        assert row.endswith("selected on the test set")
        found = metrics["classifiers"][name]
        assert found["selection"] == "selected on the test set"
        # Selecting there means that no epoch was better there, which the curves on the test images show.
        assert found["test"]["accuracy"] == pytest.approx(max(found["fit"]["curves"]["heldout_accuracy"]), abs=1e-6)
    assert metrics["classifiers"]["knn"]["selection"] == "nothing to select"
    assert metrics["classifiers"]["logistic"]["selection"] == "selected on held-out training images"
    assert metrics["protocol"] == "reported"


def test_augmented_views_are_random_crops_cached_and_learnt_from(config, capsys):
    plain = run(replace(config, classifiers="linear", figures=False))
    two = run(replace(config, classifiers="linear", augment=2, figures=False))
    capsys.readouterr()
    again = run(replace(config, classifiers="linear", augment=2, figures=False))
    assert "all 960 images from the cache" in capsys.readouterr().out  # 300 · 3 + 60
    heads = [run_["classifiers"]["linear"]["fit"]["curves"] for run_ in (plain.metrics, two.metrics, again.metrics)]
    assert heads[0] != heads[1] == heads[2]
    pixels = np.random.default_rng(0).integers(0, 256, (45, 50, 3), dtype=np.uint8)
    split = Split("train", ["0", "1"], np.zeros(2, int), lambda i: pixels, "two")
    views = [augmented(split, view, 16) for view in (0, 1)]
    assert len({view.fingerprint for view in views} | {split.fingerprint}) == 3
    seen = [view.read(i) for view in views for i in (0, 1)]
    assert all(image.shape == (16, 16, 3) for image in seen)
    assert all((one != other).any() for i, one in enumerate(seen) for other in seen[:i])
    np.testing.assert_array_equal(seen[0], augmented(split, 0, 16).read(0))


def test_augmented_views_keep_most_of_the_image_and_its_colours():
    ramp = np.broadcast_to(np.linspace(0, 250, 64).astype(np.uint8)[:, None], (64, 64, 3)[:2])
    pixels = np.stack([ramp, ramp.T, np.full((64, 64), 77, np.uint8)], axis=-1)
    split = Split("train", [str(i) for i in range(200)], np.zeros(200, int), lambda i: pixels, "ramp")
    views = np.stack([augmented(split, 0, 64).read(i) for i in range(200)]).astype(int)
    assert (views[..., 2] == 77).all()
    height = (views[:, -1, 32, 0] - views[:, 0, 32, 0]) / 250  # the ramps tell which part is seen
    across = (views[:, 32, -1, 1] - views[:, 32, 0, 1]) / 250
    area, ratio = height * abs(across), abs(across) / height
    assert 0.55 < area.min() < 0.65 and 0.95 < area.max() <= 1.02
    assert 0.72 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.38
    assert 0.35 < np.mean(across < 0) < 0.65  # flipped


@pytest.mark.slow  # a probe of a larger model, extracted and fitted for itself
def test_random_weights_are_called_an_untrained_baseline(config, capsys):
    small = replace(config, weights="random:dino_vitt16", max_train=40, max_test=20, map="tsne")
    result = run(small)
    assert result.metrics["untrained_baseline"]
    assert "UNTRAINED BASELINE" in capsys.readouterr().out
    assert list(result.metrics["classifiers"]["knn"]["test_accuracy_by_k"]) == ["10", "20"]


def test_random_weights_follow_the_seed_and_the_name():
    seeds = (3, 3, 4)
    drawn = [load_backbone("random:dino_vitt16", seed=seed, cache_dir=Path("unused")) for seed in seeds]
    model, again, other = (backbone.model for backbone in drawn)
    assert drawn[0].image_size == 224
    assert model.config == dinojax.VARIANTS["dino_vitt16"]
    leaves = [jax.tree.leaves(nnx.state(m))[-1] for m in (model, again, other)]
    assert (leaves[0] == leaves[1]).all() and not (leaves[0] == leaves[2]).all()


def test_without_a_network_the_model_in_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOJAX_WEIGHTS_URL", "http://127.0.0.1:9")  # a port that nothing listens on
    advice = (
        r"its download failed: .*; dinojax_vitt comes with the package and needs no network \(--weights dinojax_vitt\)"
    )
    with pytest.raises(UserError, match=advice):
        load_backbone("dino_vits8", seed=0, cache_dir=tmp_path)
    assert load_backbone("dinojax_vitt", seed=0, cache_dir=tmp_path).image_size == 32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "missing/folder"], "--data missing/folder: there is no such folder"),
        (["cifar10"], "cifar10 and --data digits name different images; give one of them"),
        (["--val-fraction", "0.2"], "--val-fraction 0.2: digits has test images already; leave the flag out"),
        (["--val-fraction", "1"], "--val-fraction 1.0 is not above 0 and below 1"),
        (["--weights", "missing.pth"], "missing.pth: there is no such file or folder of weights"),
        (["--weights", "random:dino_vitx"], "'dino_vitx' is not one of dino_vitt16, "),
        (["--max-train", "5"], "--max-train 5 is fewer than one image for each of the 10 classes"),
        (["--epochs", "0"], "--epochs 0 is not a positive number"),
        (["--heldout-fraction", "1"], "--heldout-fraction 1.0 is not above 0 and below 1"),
        (["--classifiers", "knn,svm"], "--classifiers knn,svm: there is no 'svm'; did you mean svc?"),
        (["--classifiers", "knn", "--max-train", "15"], "knn needs at least k = 20 training images and there are 15"),
        (["--classifiers", "few_shot", "--shots", "500"], "few_shot needs --shots 500 training images of every class"),
        (["--augment", "-1"], "--augment -1 is not 0 or more"),
        (["--sweep-steps", "0"], "--sweep-steps 0 is not a positive number"),
        (["--image-size", "3"], "--image-size 3 is smaller than one patch"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(config, capsys, flags, message):
    given = ["--data", "digits", "--weights", config.model.weights, "--out", str(config.run.out), "--image-size", "16"]
    with pytest.raises(SystemExit) as stop:
        main([*given, "--cache-dir", str(config.run.cache_dir), *flags])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not config.run.out.exists() and not config.run.cache_dir.exists()
    assert files(config.run.out.parent) == {"weights"}


def test_the_images_are_given_first_or_as_data(tmp_path):
    for given in (["digits"], ["--data", "digits"], ["digits", "--data", "digits"]):
        assert command_line(Config, "probe", "", given).resolved().dataset.data == "digits"
        assert command_line(evaluate.Config, "evaluate", "", ["model", *given]).resolved().dataset.data == "digits"
        folder = command_line(finetune_folder.Config, "finetune", "", given).resolved().dataset.folder
        assert folder == Path("digits")
    assert command_line(Config, "probe", "", []).resolved().dataset.data == "cifar10"
    assert create(Config).resolved().dataset.data == "cifar10"
    for kind in (create(evaluate.Config, weights="model"), finetune_folder.Config()):
        with pytest.raises(UserError, match="no images were given; name "):
            kind.resolved()
    same = command_line(Config, "probe", "", [str(tmp_path), "--data", f"{tmp_path}/"]).resolved()
    assert same.dataset.data == str(tmp_path)


def test_the_images_that_the_patch_does_not_divide_are_said(config, tmp_path, capsys):
    """Of 18 px, four patches of 4 px are seen; features are those of images without the last 2 px."""
    shape = ViTConfig(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    model = VisionTransformer(shape, rngs=nnx.Rngs(0))
    pixels = np.random.default_rng(0).random((1, 18, 18, 3), dtype=np.float32)
    np.testing.assert_allclose(model(pixels).cls_token, model(pixels[:, :16, :16]).cls_token, atol=1e-6)
    run(replace(config, image_size=18, classifiers="knn", max_train=40, figures=False))
    note = "note: images of 18×18 px are not whole patches of 4 px: the model sees 16×16 px, and the rest"
    assert note in capsys.readouterr().out
    run(replace(config, classifiers="knn", max_train=40, figures=False))
    assert "whole patches" not in capsys.readouterr().out


def test_a_corrupt_image_stops_the_run_by_name_and_leaves_no_run_folder(config, tmp_path, capsys):
    for split, name in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        folder = tmp_path / "data" / split / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "data" / "train" / "b" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    flags = [
        "--weights",
        config.model.weights,
        "--image-size",
        "16",
        "--out",
        str(config.run.out),
        "--classifiers",
        "linear",
    ]
    with pytest.raises(SystemExit) as stop:
        main(["--data", str(tmp_path / "data"), "--cache-dir", str(config.run.cache_dir), *flags])
    assert stop.value.code == 2
    assert "train/b/2.png is not a readable image" in capsys.readouterr().err
    assert not config.run.out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_folders_are_not_written_to(config):
    config.run.out.mkdir()
    (config.run.out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files; name a new folder"):
        run(config)
    assert files(config.run.out) == {"thesis.txt"}


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
    for word in ("--data", "--weights", "--image-size", "--max-train", "digits", "random", "--classifiers", "sweep"):
        assert word in done.stdout
