"""Every command on every kind of run folder: it takes it, or says in one sentence what it is and what takes it."""

import shutil

import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure
from PIL import Image

import dinojax
from dinojax import Preprocessing, VisionTransformer, ViTConfig
from experiments import cifar10_probe, dense, evaluate, finetune_folder, predict, summarize, visualize
from experiments.features.backbones import load_backbone, short_name
from experiments.features.fingerprints import fingerprint
from experiments.runs.kinds import Kind, kind_of

TINY = ViTConfig(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
COUNTS = {"red": 12, "green": 8, "blue": 5}
FOLDERS = {
    "model": Kind.MODEL,
    "pretraining": Kind.PRETRAINING,
    "probe": Kind.PROBE,
    "evaluation": Kind.EVALUATION,
    "tuning": Kind.TUNING,
    "tuning/linear": Kind.TUNED,
    "tuning/lora": Kind.TUNED,
    "one mode": Kind.TUNING,
    "unfinished": Kind.UNFINISHED_TUNING,
    "unfinished/linear": Kind.UNFINISHED_TUNING,
    "dense": Kind.DENSE,
    "figures": Kind.FIGURES,
    "predictions": Kind.PREDICTIONS,
    "empty": Kind.OTHER,
}


def model(seed):
    return VisionTransformer(TINY, rngs=nnx.Rngs(seed), preprocessing=Preprocessing(image_size=16, patch_size=4))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of each kind, made by the commands themselves, and images in class folders."""
    place = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for channel, (name, count) in enumerate(COUNTS.items()):
        (place / "images" / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(place / "images" / name / f"{i}.png")
    dinojax.save(model(0), place / "model")
    for seed, network in enumerate(("teacher", "student")):
        dinojax.save(model(seed), place / "pretraining" / network)
    (place / "pretraining" / "checkpoints").mkdir()
    (place / "pretraining" / "config.json").write_text("{}")
    (place / "empty").mkdir()
    data = [str(place / "images"), "--val-fraction", "0.4", "--cache-dir", str(place / "cache")]
    weights, quick = ["--weights", str(place / "model")], ["--classifiers", "knn5", "--no-figures"]
    cifar10_probe.main([*data, *weights, *quick, "--image-size", "16", "--out", str(place / "probe")])
    evaluate.main([str(place / "pretraining"), *data, *quick, "--out", str(place / "evaluation")])
    tune = [*data, *weights, "--epochs", "1"]
    finetune_folder.main([*tune, "--out", str(place / "one mode")])
    for folder in ("tuning", "unfinished"):
        shutil.copytree(place / "one mode", place / folder)
    finetune_folder.main([*tune, "--mode", "lora", "--out", str(place / "tuning")])
    for name in ("metrics.json", "classifiers.json"):
        (place / "unfinished" / "linear" / name).unlink()
    (place / "unfinished" / "metrics.json").unlink()
    for part in ("images", "masks"):
        (place / "pairs" / part).mkdir(parents=True)
        for i in range(3):
            array = rng.integers(0, 3, (16, 16, 3) if part == "images" else (16, 16), dtype=np.uint8)
            Image.fromarray(array).save(place / "pairs" / part / f"{i}.png")
    dense.main([str(place / "pairs"), *weights, *data[3:], "--image-size", "16", "--epochs", "1",
                "--out", str(place / "dense")])  # fmt: skip
    image = place / "images" / "red" / "0.png"
    visualize.main([str(place / "model"), str(image), "--out", str(place / "figures")])
    predict.main([str(image), "--run", str(place / "probe"), "--out", str(place / "predictions")])
    return place


def said(capsys, main, arguments):
    """What a command printed, or its one error sentence."""
    capsys.readouterr()
    try:
        main(list(map(str, arguments)))
    except SystemExit as stop:
        assert stop.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(lines) == 1
        return lines[0]
    return capsys.readouterr().out


@pytest.mark.parametrize(("folder", "kind"), FOLDERS.items())
def test_each_kind_is_known(place, folder, kind):
    assert kind_of(place / folder) is kind


NO_NETWORK = {
    "probe": "is a run of `dinojax probe` and holds no network; `dinojax predict IMAGES --run {}` and `dinojax "
    "summarize {}` take it, and its network was {}/model",
    "evaluation": "is an evaluation and holds no network; `dinojax summarize {}` takes it, and its network was",
    "tuning": "is a fine-tuning with several modes; name one: {}/linear, {}/lora",
    "unfinished": "is a fine-tuning that has not ended and holds no network; repeat its command, which resumes it",
    "unfinished/linear": "is a fine-tuning that has not ended and holds no network; repeat its command",
    "dense": "is a run of `dinojax dense` and holds no network; `dinojax predict IMAGES --run {}` and "
    "`dinojax summarize {}` take it, and its network was {}/model",
    "figures": "is the output of `dinojax visualize` and holds no network; its figures are the result",
    "predictions": "is the output of `dinojax predict` and holds no network; predictions.csv in it is the result",
    "empty": "holds no weights",
}
BACKBONES = {
    "model": "model",
    "pretraining": "pretraining/teacher",
    "tuning/linear": "model",
    "tuning/lora": "tuning/lora/model",
    "one mode": "model",
}


def sentence(place, folder, text):
    whole = str(place / folder)
    return text.replace("{}/model", str(place / "model")).replace("{}", whole)


@pytest.mark.parametrize("folder", FOLDERS)
def test_as_weights(place, tmp_path, capsys, folder):
    """`visualize`, and the loading that `probe`, `evaluate` and `finetune` share."""
    arguments = [place / folder, place / "images" / "red" / "0.png", "--out", tmp_path / "out", "--save-arrays"]
    text = said(capsys, visualize.main, arguments)
    if folder in NO_NETWORK:
        assert text.startswith(f"error: {place / folder}") and sentence(place, folder, NO_NETWORK[folder]) in text
        assert not (tmp_path / "out").exists()
        return
    head_alone = folder in ("tuning/linear", "one mode")
    note = f"note: {place / folder} holds a head alone; the backbone below it, {place / 'model'}, is used"
    assert (note in text) == head_alone
    truth = dinojax.load(place / BACKBONES[folder])
    found = load_backbone(str(place / folder), seed=0, cache_dir=None)
    assert fingerprint(found.model) == fingerprint(truth)
    assert found.image_size == 16


@pytest.mark.parametrize("folder", FOLDERS)
def test_as_the_run_of_predict(place, tmp_path, capsys, folder):
    arguments = [place / "images" / "blue" / "0.png", "--run", place / folder, "--out", tmp_path / "out"]
    text = said(capsys, predict.main, arguments)
    if folder == "dense":
        assert "predictions.csv" in text and "0_mask.png" in text
        return
    if folder in ("probe", "tuning/linear", "tuning/lora", "one mode"):
        assert "predictions.csv" in text and f"{place}/" not in text.split("\n")[1]
        return
    if folder == "tuning":
        assert "is a fine-tuning with several modes; name one of them: " in text
    else:
        kind = FOLDERS[folder].value
        assert f"--run {place / folder} is {kind} and holds no classifiers; " in text
    if folder in ("model", "pretraining"):
        assert f"`dinojax probe DATA --weights {place / folder}`" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", FOLDERS)
def test_as_a_run_of_summarize(place, capsys, folder):
    text = said(capsys, summarize.main, [place / folder])
    if folder in ("probe", "evaluation"):
        assert "## All numbers" in text and "images, validation images" not in text
        assert "k-NN, Euclidean, k = 5, balanced" in text and "16 px, validation images" in text
    elif folder in ("tuning", "tuning/linear", "tuning/lora", "one mode"):
        assert "## Fine-tuning" in text
    elif folder == "dense":
        assert "## Dense heads" in text and "### Segmentation" in text
    elif folder == "empty":
        assert "holds no result.json of a run" in text
    elif folder == "pretraining":  # without a result, which this one was not given
        assert "is a pretraining and holds no results; `dinojax probe DATA" in text
    else:
        assert f"{place / folder} is {FOLDERS[folder].value} and holds no results; " in text


@pytest.mark.parametrize("folder", ["pretraining", "tuning/linear", "tuning/lora", "one mode"])
def test_evaluate_and_finetune_take_what_holds_a_network(place, tmp_path, capsys, folder):
    data = ["--data", place / "images", "--val-fraction", "0.4", "--cache-dir", place / "cache"]
    quick = ["--classifiers", "knn5", "--no-figures", "--out", tmp_path / "out"]
    text = said(capsys, evaluate.main, [place / folder, *data, *quick])
    assert "15 training images and 10 validation images, 3 classes" in text
    assert "Per cent of the 10 validation images" in text and "test images" not in text
    assert "balanced accuracy (the mean over the classes)" in text
    assert "the largest class has 5 validation images and the smallest 2, more than 1.5 times as many" in text
    tuned = said(capsys, finetune_folder.main,
                 [*data, "--weights", place / folder, "--epochs", "1", "--out", tmp_path / "tuned"])  # fmt: skip
    assert "validation accuracy" in tuned
    text = said(capsys, predict.main, [place / "images" / "red", "--run", tmp_path / "tuned"])
    assert "predictions.csv" in text


def test_a_tuned_model_is_the_one_in_the_folder_also_where_that_was_copied(place, tmp_path, capsys):
    """classifiers.json holds the path at which the run was made."""
    shutil.copytree(place / "tuning" / "lora", tmp_path / "copied")
    found = load_backbone(str(tmp_path / "copied"), seed=0, cache_dir=None)
    assert found.weights == str(tmp_path / "copied" / "model")
    assert "holds a head alone" not in capsys.readouterr().out


def test_a_backbone_that_changed_below_its_head_is_refused(place, tmp_path, capsys):
    shutil.copytree(place / "one mode", tmp_path / "run")
    shutil.copytree(place / "model", tmp_path / "kept")
    data = [place / "images" / "red" / "0.png", "--out", tmp_path / "out"]
    try:
        shutil.rmtree(place / "model")
        dinojax.save(model(7), place / "model")
        text = said(capsys, visualize.main, [tmp_path / "run", *data])
    finally:
        shutil.rmtree(place / "model")
        shutil.copytree(tmp_path / "kept", place / "model")
    assert "trained a head on" in text and "whose parameters have changed since" in text


class CannotDrawError(Exception):
    pass


@pytest.fixture
def no_figure(monkeypatch):
    """Matplotlib that cannot write a figure."""

    def fail(figure, path, **options):
        raise CannotDrawError

    monkeypatch.setattr(Figure, "savefig", fail)


def test_a_failing_figure_loses_no_result(place, tmp_path, no_figure, capsys):
    data = [str(place / "images"), "--val-fraction", "0.4", "--cache-dir", str(place / "cache")]
    image, folder = str(place / "images" / "red" / "0.png"), str(place / "pretraining")
    weights, quick = ["--weights", str(place / "model")], ["--classifiers", "knn5"]
    commands = {
        "probe": (cifar10_probe.main, [*data, *weights, *quick, "--image-size", "16"], "k-NN, Euclidean"),
        "evaluation": (evaluate.main, [folder, *data, *quick], "k-NN, Euclidean"),
        "tuning": (finetune_folder.main, [*data, *weights, "--epochs", "1"], "| linear |"),
        "predictions": (predict.main, [image, "--run", str(place / "probe")], "0.png"),
        "maps": (visualize.main, [str(place / "model"), image, "--save-arrays"], ""),
    }
    expected = {
        "probe": {"classifiers.json", "result.json", "metrics.json", "predictions_knn5.csv", "config.json"},
        "evaluation": {"result.json", "config.json"},
        "tuning": {"metrics.json", "results.md", "linear"},
        "tuning/linear": {"metrics.json", "predictions.csv", "classifiers.json", "finetuned.safetensors"},
        "predictions": {"predictions.csv", "config.json"},
        "maps": {"0.npz", "config.json"},
    }
    for name, (main, arguments, shown) in commands.items():
        capsys.readouterr()
        with pytest.raises(CannotDrawError):
            main([*arguments, "--out", str(tmp_path / name)])
        assert shown in capsys.readouterr().out
    for name, files in expected.items():
        assert files <= {path.name for path in (tmp_path / name).iterdir()}, name
        assert not list((tmp_path / name).glob("*.png"))
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_missing_figures_of_a_fine_tuning_are_drawn_by_the_same_command(place, tmp_path, monkeypatch, capsys):
    data = [str(place / "images"), "--val-fraction", "0.4", "--cache-dir", str(place / "cache")]
    shutil.copytree(place / "one mode", tmp_path / "run")
    for figure in tmp_path.rglob("*.png"):
        figure.unlink()
    finetune_folder.main([*data, "--weights", str(place / "model"), "--epochs", "1", "--out", str(tmp_path / "run")])
    assert "linear is finished" in capsys.readouterr().out
    assert {path.name for path in tmp_path.rglob("*.png")} == {"confusion.png", "curves.png"}


def test_paths_in_titles_are_short():
    assert short_name("/home/me/weights") == "me/weights"
    assert short_name("/weights") == "weights"
    assert short_name("dinojax_vitt") == "dinojax_vitt"
    assert short_name("/data/runs/dino/small/teacher") == "dino/small/teacher"
    assert short_name("runs/x/llrd/model") == "x/llrd/model"
