"""The evaluation: equal to scikit-learn on the model's own outputs, repeatable, and blind to the test images."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file
from sklearn.neighbors import KNeighborsClassifier

import dinojax
from dinojax import Preprocessing, UserError, VisionTransformer, ViTConfig
from dinojax.pretraining.augment import MultiCropConfig
from dinojax.probes import fit_linear, linear_logits, split_heldout
from experiments import evaluate as command
from experiments import summarize
from experiments.data.load import load_dataset
from experiments.data.splits import Dataset
from experiments.data.views import augmented
from experiments.features.backbones import load_backbone
from experiments.pretraining.config import PretrainConfig
from experiments.pretraining.loop import pretrain
from experiments.probing.config import EvaluationConfig
from experiments.probing.result import run_evaluation
from experiments.runs.settings import create

SIZE, TRAIN, TEST = 16, 260, 90
SHAPE = ViTConfig(img_size=SIZE, patch_size=8, embed_dim=16, depth=4, num_heads=2)
OWN = Preprocessing((0.3, 0.5, 0.6), (0.4, 0.2, 0.3), image_size=SIZE, patch_size=8)
SOURCE = {"data": "digits", "epochs": 3, "seed": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder of a training."""
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    for seed, network in enumerate(("teacher", "student")):
        model = VisionTransformer(SHAPE, rngs=nnx.Rngs(seed), preprocessing=OWN)
        dinojax.save(model, folder / network, source=SOURCE)
    (folder / "metrics.jsonl").write_text("")
    (folder / "config.json").write_text("{}")
    return folder


def config(run, **changes):
    options = {"data": "digits", "max_train": TRAIN, "max_test": TEST, "epochs": 4, "sweep_steps": 20, "draws": 2}
    options |= {"out": run.parent / "out", "cache_dir": run.parent / "cache", "figures": False}
    return create(EvaluationConfig, weights=str(run), **{**options, **changes})


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def rows_of(folder):
    return {(row["network"], row["features"], row["probe"]): row for row in result_of(folder)["rows"]}


def evaluated_rows(settings, dataset):
    return rows_of(run_evaluation(settings, dataset, command="evaluate").folder)


@pytest.fixture(scope="module")
def evaluated(run):
    """Everything, of both networks and of raw pixels."""
    return command.run(config(run, pixels=True, figures=True, out=run.parent / "evaluated")).folder


def resized(pixels, size):
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def embedded(run, network, images):
    """CLS tokens and mean patches from the model's own call."""
    pixels = (np.stack(images) / 255 - OWN.mean) / OWN.std
    outputs = dinojax.load(run / network)(pixels.astype(np.float32))
    return {"cls": np.asarray(outputs.cls_token), "mean_patch": np.asarray(outputs.patch_tokens.mean(axis=1))}


def read(split):
    return [split.read(i) for i in range(len(split))]


def weighted_knn(train, labels, test, k):
    train, test = (features / np.linalg.norm(features, axis=1, keepdims=True) for features in (train, test))
    similarity = test @ train.T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / 0.07)
    return np.stack([(weights * (labels[nearest] == c)).sum(axis=1) for c in range(10)], axis=1).argmax(axis=1)


@pytest.mark.parametrize("network", ["teacher", "student"])
@pytest.mark.parametrize("kind", ["cls", "mean_patch"])
def test_neighbours_are_those_of_the_models_own_outputs(run, evaluated, network, kind):
    data, rows = load_dataset("digits", max_train=TRAIN, max_test=TEST), rows_of(evaluated)
    train, test = (embedded(run, network, [resized(i, SIZE) for i in read(s)])[kind] for s in (data.train, data.test))
    for k in (10, 20, 100, 200):
        expected = np.mean(weighted_knn(train, data.train.labels, test, k) == data.test.labels)
        assert rows[network, kind, f"knn_{k}"]["accuracy"] == pytest.approx(expected)
    expected = KNeighborsClassifier(5).fit(train, data.train.labels).score(test, data.test.labels)
    assert rows[network, kind, "knn5"]["accuracy"] == pytest.approx(expected)


def test_the_crop_protocol_learns_from_crops_and_is_evaluated_on_framed_images(run, evaluated):
    data = load_dataset("digits", max_train=TRAIN, max_test=TEST)
    crops = read(augmented(data.train, 0, SIZE))
    framed = [resized(image, SIZE + 8)[4:-4, 4:-4] for image in read(data.test)]
    for kind in ("cls", "mean_patch"):
        train, test = (embedded(run, "teacher", images)[kind] for images in (crops, framed))
        expected = KNeighborsClassifier(5).fit(train, data.train.labels).score(test, data.test.labels)
        assert rows_of(evaluated)["teacher", kind, "knn5_crops"]["accuracy"] == pytest.approx(expected)
    kept, heldout = split_heldout(data.train.labels, 0.1, 0)
    framed_train = [resized(image, SIZE + 8)[4:-4, 4:-4] for image in read(data.train)]
    train, chosen, test = (embedded(run, "teacher", images)["cls"] for images in (crops, framed_train, framed))
    head, history, best = fit_linear(
        train[kept], data.train.labels[kept], chosen[heldout], data.train.labels[heldout], num_classes=10,
        key=jax.random.key(0), epochs=4, batch_size=256, learning_rate=1e-3,
    )  # fmt: skip
    row = rows_of(evaluated)["teacher", "cls", "linear_crops"]
    assert row["details"]["best_epoch"] == best + 1
    for name, values in history._asdict().items():
        np.testing.assert_allclose(row["details"]["curves"][name], values, atol=1e-4)
    accuracy = np.mean(np.asarray(linear_logits(head, test)).argmax(axis=1) == data.test.labels)
    assert row["accuracy"] == pytest.approx(accuracy, abs=1.5 / TEST)


def test_raw_pixels_are_evaluated_too(run, evaluated):
    data = load_dataset("digits", max_train=TRAIN, max_test=TEST)
    train, test = (np.stack([resized(i, SIZE) for i in read(s)]).reshape(len(s), -1) for s in (data.train, data.test))
    expected = KNeighborsClassifier(5).fit(train / 255, data.train.labels).score(test / 255, data.test.labels)
    rows = rows_of(evaluated)
    assert rows["pixels", "pixels", "knn5"]["accuracy"] == pytest.approx(expected)
    assert rows["pixels", "pixels", "linear_crops"]["accuracy"] > 0.2
    assert not [key for key in rows if key[0] == "pixels" and key[2] == "sweep"]


def test_there_is_a_row_for_every_probe_network_and_kind_of_features(evaluated, capsys):
    rows = rows_of(evaluated)
    each = {"knn_10", "knn_20", "knn_100", "knn_200", "knn5", "knn5_crops", "linear_crops"}
    each |= {"5_shot_1nn", "5_shot_knn", "5_shot_linear"}
    networks = ("teacher", "student")
    expected = {(network, kind, probe) for network in networks for kind in ("cls", "mean_patch") for probe in each}
    expected |= {(network, "chosen", "sweep") for network in networks} | {("pixels", "pixels", probe) for probe in each}
    assert rows.keys() == expected
    few = rows["teacher", "cls", "5_shot_1nn"]
    assert len(few["accuracies"]) == 2 and few["accuracy"] == pytest.approx(np.mean(few["accuracies"]))
    assert few["deviation"] == pytest.approx(np.std(few["accuracies"], ddof=1))
    knn = rows["teacher", "cls", "knn_20"]
    p, z = knn["accuracy"], 1.959964  # Wilson (1927)
    middle, half = p + z**2 / (2 * TEST), z * np.sqrt(p * (1 - p) / TEST + z**2 / (4 * TEST**2))
    assert knn["interval"] == pytest.approx([(middle - half) / (1 + z**2 / TEST), (middle + half) / (1 + z**2 / TEST)])


def test_the_files_and_what_the_result_tells(run, evaluated):
    curves = {f"curves_{n}_{k}.png" for n in ("teacher", "student") for k in ("cls", "mean_patch")}
    files = {path.name for path in evaluated.iterdir()}
    assert files == curves | {"curves_pixels.png", "accuracies.png", "config.json", "result.json"}
    for name in files:
        if name.endswith(".png"):
            drawn = np.asarray(Image.open(evaluated / name).convert("L"))
            assert min(drawn.shape) > 400 and drawn.std() > 10
    result = result_of(evaluated)
    assert result["image_size"] == result["resize"] == SIZE
    assert result["config"]["max_train"] == TRAIN and result["config"]["seed"] == 0
    assert result["environment"].keys() >= {"git_commit", "device", "packages", "python"}
    assert result["pretraining"] == SOURCE
    assert result["seconds"].keys() == {"teacher", "student", "pixels"}
    assert result["seconds"]["teacher"]["features"] > 0
    for row in result["rows"]:
        if row["probe"] == "linear_crops":
            found, best = row["details"]["curves"], row["details"]["best_epoch"] - 1
            assert all(len(values) == 4 for values in found.values())
            assert found["heldout_accuracy"][best] == max(found["heldout_accuracy"])
            assert row["train_accuracy"] == pytest.approx(found["train_accuracy"][best])


def test_evaluating_twice_gives_identical_numbers(run, evaluated, capsys):
    again = command.run(config(run, out=run.parent / "again")).folder
    said = capsys.readouterr().out
    assert said.count(f"all {2 * (TRAIN + TEST) + TRAIN // 10} images from the cache") == 2
    rows, first = rows_of(again), rows_of(evaluated)
    assert rows == {key: row for key, row in first.items() if key[0] != "pixels"}
    for line in said.splitlines():
        if line.startswith("k-NN, Euclidean, k = 5 "):
            shown = [float(number) for number in line.split()[-4:]]
            columns = [(n, k) for n in ("teacher", "student") for k in ("cls", "mean_patch")]
            assert shown == [round(100 * rows[*column, "knn5"]["accuracy"], 2) for column in columns]


def test_the_test_images_choose_nothing(run):
    """Other labels of the test images change accuracies alone."""
    data = load_dataset("digits", max_train=TRAIN, max_test=TEST)
    shuffled = dataclasses.replace(data.test, labels=np.random.default_rng(0).permutation(data.test.labels))
    one, other = (
        evaluated_rows(config(run, network="teacher", out=run.parent / name), dataset)
        for name, dataset in (("straight", data), ("shuffled", dataclasses.replace(data, test=shuffled)))
    )
    for key in one:
        assert one[key]["details"] == other[key]["details"]
        assert one[key]["train_accuracy"] == other[key]["train_accuracy"]
    assert one["teacher", "cls", "linear_crops"]["accuracy"] > other["teacher", "cls", "linear_crops"]["accuracy"] + 0.1


def test_an_interrupted_evaluation_leaves_nothing_and_resumes_from_the_cache(run, tmp_path):
    data = load_dataset("digits", max_train=TRAIN, max_test=TEST)
    reads, after = [], [TRAIN + TEST // 2]

    def read_one(i):
        reads.append(i)
        if len(reads) > after[0]:
            raise KeyboardInterrupt
        return data.test.read(i)

    test = dataclasses.replace(data.test, read=read_one, fingerprint="counted")
    counted = Dataset("digits", data.class_names, data.train, test)
    options = {"network": "student", "classifiers": "knn5,few_shot", "batch_size": 32, "cache_dir": tmp_path / "cache"}
    settings = config(run, out=tmp_path / "out", **options)
    after[0] = TEST // 2
    with pytest.raises(KeyboardInterrupt):
        evaluated_rows(settings, counted)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    after[0], before = 10 * TEST, {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(before) == 1  # the training images
    resumed = evaluated_rows(settings, counted)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert resumed == evaluated_rows(config(run, out=tmp_path / "whole", **options), data)


@pytest.mark.slow  # a training and two evaluations, each compiled for itself
def test_a_real_training_is_evaluated_as_at_its_end_and_summarised(tmp_path, capsys):
    crops = MultiCropConfig(global_size=8, local_size=4, local_crops=1)
    training = create(
        PretrainConfig, data="digits", max_train=320, max_test=100, batch_size=64, epochs=1, patch_size=4, embed_dim=16,
        depth=1, num_heads=2, prototypes=16, head_hidden_dim=16, bottleneck_dim=8, warmup_epochs=0, knn_every=0,
        own_statistics=True, crops=crops, out=tmp_path / "run", evaluate=False, cache_dir=tmp_path / "cache",
    )  # fmt: skip
    said = pretrain(training).test_knn_accuracy
    options = {"max_train": 320, "max_test": 100, "cache_dir": tmp_path / "cache"}
    folder = command.run(config(tmp_path / "run", out=tmp_path / "out", classifiers="knn,sweep", **options)).folder
    assert "the sweep of 52 heads needs 4 blocks and this model has 1; it is left out" in capsys.readouterr().out
    rows = rows_of(folder)
    for network in ("teacher", "student"):
        assert rows[network, "cls", "knn_20"]["accuracy"] == pytest.approx(said[network])
    known = result_of(folder)["pretraining"]
    assert known["train_seconds"] > 0 and known["config"]["epochs"] == known["epochs"] == 1 and known["seed"] == 0
    text = summarize.run(summarize.Config((tmp_path,))).text
    overview = [line for line in text.splitlines() if line.startswith("| ViT 16×1/4")]
    assert len(overview) == 2 and all(f"{100 * said['teacher']:.2f} (1)" in line for line in overview)
    device = {"gpu": "GPU", "cuda": "GPU"}.get(known["backend"], known["backend"].upper())
    assert all(f" {device} h " in line for line in overview)


def test_a_backbone_brings_its_size_and_a_single_model_its_name(run, tmp_path):
    assert load_backbone(str(run), seed=0, cache_dir=tmp_path).image_size == SIZE
    dinojax.save(VisionTransformer(dataclasses.replace(SHAPE, img_size=518), rngs=nnx.Rngs(0)), tmp_path / "large")
    assert load_backbone(str(tmp_path / "large"), seed=0, cache_dir=tmp_path).image_size == 224
    options = {"classifiers": "few_shot", "resize": 20, "out": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    command.run(config(run / "student", **options))
    assert {key[0] for key in rows_of(tmp_path / "out")} == {"student"}
    command.run(config(tmp_path / "large", image_size=16, untrained=True, **options))
    rows = rows_of(tmp_path / "out")
    assert {key[0] for key in rows} == {"model", "untrained"}
    # The model itself was drawn from that seed.
    assert all(row["accuracies"] == rows["model", *key[1:]]["accuracies"] for key, row in rows.items())
    assert result_of(tmp_path / "out")["resize"] == 20


@pytest.mark.parametrize(
    ("weights", "flags", "message"),
    [
        ("unfinished", [], "unfinished is the run of a training that has not ended and holds no checkpoint yet"),
        ("dino_vitz", [], "no model is called 'dino_vitz': did you mean dino_vitt8 or dino_vits8"),
        ("missing.pth", [], "missing.pth: there is no such file or folder of weights"),
        ("plain", [], "plain holds no weights: model.safetensors or pytorch_model.bin was expected in it"),
        ("resnet.safetensors", [], "resnet.safetensors: "),
        ("other", [], "is damaged or was edited"),
        ("run", ["--data", "plain"], "plain is empty: images belong in train/<class>/"),
        ("run", ["--data", "unlabelled"], "train holds no class folders, only 1.png: images belong in train/<class>/"),
        ("run", ["--out", "run"], "--out run is the run folder of a training; name a new folder"),
        ("run/teacher", ["--network", "student"], "is not the run folder of a training with several networks"),
        ("run", ["--resize", "12"], "--resize 12 is less than the 16 px that are cropped from it"),
        ("run", ["--image-size", "4"], "--image-size 4 is smaller than one patch"),
        ("run", ["--classifiers", "knn,few_shots"], "there is no 'few_shots'; did you mean few_shot?"),
        ("run", ["--shots", "200"], "few_shot needs --shots 200 training images of every class"),
        ("run", ["--epochs", "0"], "--epochs 0 is not a positive number"),
        ("run", ["--heldout-fraction", "0"], "--heldout-fraction 0.0 is not above 0 and below 1"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(run, tmp_path, monkeypatch, capsys, weights, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(run)
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    (tmp_path / "plain").mkdir()
    for split in ("train", "test"):
        (tmp_path / "unlabelled" / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "unlabelled" / split / "1.png")
    save_file({"layer1.0.conv1.weight": np.zeros((4, 3, 7, 7), np.float32)}, tmp_path / "resnet.safetensors")
    other = dinojax.save(VisionTransformer(SHAPE, rngs=nnx.Rngs(0)), tmp_path / "other")
    document = json.loads((other / "config.json").read_text())
    document["config"]["depth"] = 3
    (other / "config.json").write_text(json.dumps(document))
    before = sorted(path.name for path in tmp_path.iterdir())
    given = ["--data", "digits", "--max-train", "100"] if "--data" not in flags else []
    with pytest.raises(SystemExit) as stop:
        command.main([weights, *given, "--out", "out", "--cache-dir", "cache", *flags])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_damaged_result_of_the_training_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json is missing or damaged"):
        command.run(config(tmp_path / "run", classifiers="knn5", out=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
