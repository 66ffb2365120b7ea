"""Images from anywhere: the stored predictions come back, and what cannot be classified is one sentence."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dinojax
from dinojax import UserError, VisionTransformer, ViTConfig
from experiments import cifar10_probe, predict
from experiments.data.digits import load_digits
from experiments.features.extractor import FeatureExtractor
from experiments.runs.settings import create, flat

REPOSITORY = Path(__file__).parents[2]
NAMES = ("knn", "knn5", "linear", "sweep", "mlp", "svc")  # every kind of head
TINY = ViTConfig(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of digits as PNG, a backbone, and a run of classifiers on them."""
    place = tmp_path_factory.mktemp("predict")
    digits = load_digits()
    for split, count in ((digits.train, 120), (digits.test, 40)):
        for i in range(count):
            folder = place / "data" / split.name / f"digit {split.labels[i]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.read(i)).save(folder / f"{i}.png")
    dinojax.save(VisionTransformer(TINY, rngs=nnx.Rngs(0)), place / "weights")
    cifar10_probe.run(
        create(
            cifar10_probe.Config, data=str(place / "data"), weights=str(place / "weights"),
            classifiers=",".join(NAMES), image_size=16,
            epochs=2, mlp_epochs=2, sweep_steps=20, figures=False, out=place / "run", cache_dir=place / "cache",
        )
    )  # fmt: skip
    return place


def config(place, image, **changes):
    options = {"run": place / "run", "cache_dir": place / "other cache", "out": place / "out", **changes}
    return create(predict.Config, image=image, **options)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("part", ["train", "test"])
def test_images_of_the_run_get_the_predictions_that_it_stored(place, part, tmp_path):
    predict.run(config(place, place / "data", out=tmp_path / part))
    told = {(row["classifier"], row["file"]): row for row in rows(tmp_path / part / "predictions.csv")}
    for name in NAMES:
        stored = [row for row in rows(place / "run" / f"predictions_{name}.csv") if row["split"] == part]
        assert len(stored) in (120, 40)
        for row in stored:
            again = told[name, row["id"]]
            assert again["class"] == row["predicted"]
            if row["probability"]:
                assert float(again["probability"]) == pytest.approx(float(row["probability"]), abs=1e-4)
            else:
                assert (name, again["probability"]) == ("svc", "")


def test_nothing_is_fitted_again(place, monkeypatch):
    from experiments.probing import fitting

    monkeypatch.setattr(fitting, "fit", None)
    before = {file: file.read_bytes() for file in (place / "run").iterdir() if file.is_file()}
    found = predict.run(config(place, place / "data" / "test"))
    assert tuple(found) == NAMES and all(len(one.classes) == 40 for one in found.values())
    assert before == {file: file.read_bytes() for file in before}


@pytest.mark.parametrize(("suffix", "mode"), [("jpg", "RGB"), ("png", "RGBA"), ("webp", "RGB"), ("JPEG", "L")])
def test_any_picture_is_classified_with_a_table_and_a_figure(place, tmp_path, capsys, suffix, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / f"photo.{suffix}")
    predict.main([str(tmp_path / f"photo.{suffix}"), "--run", str(place / "run"), "--classifiers", "svc, linear",
                  "--out", str(tmp_path / "out"), "--cache-dir", str(tmp_path)])  # fmt: skip
    said = capsys.readouterr().out
    header, line = (row for row in said.splitlines() if row.startswith(("file", "photo")))
    assert header.split() == ["file", "svc", "linear"]
    assert line.count("digit") == 2 and line.count("%") == 1
    figure = np.asarray(Image.open(tmp_path / "out" / "predictions.png").convert("L"))
    assert min(figure.shape) > 200 and figure.std() > 10


def test_by_default_a_new_folder_in_the_run_is_written_to(place):
    predict.run(config(place, place / "data" / "test" / "digit 1", out=None, classifiers="linear"))
    (folder,) = (place / "run" / "predictions").iterdir()
    assert {file.name for file in folder.iterdir()} == {"config.json", "predictions.csv", "predictions.png"}
    shutil.rmtree(place / "run" / "predictions")


def test_broken_images_of_a_folder_are_named_and_left_out_and_alone_refused(place, tmp_path, capsys):
    good, broken = tmp_path / "in" / "a" / "good.png", tmp_path / "in" / "broken.jpg"
    good.parent.mkdir(parents=True)
    shutil.copy(next((place / "data" / "test").rglob("*.png")), good)
    broken.write_bytes(b"\xff\xd8 no picture")
    (tmp_path / "in" / "notes.txt").write_text("mine")
    predict.run(config(place, tmp_path / "in", out=tmp_path / "out", classifiers="linear"))
    said = capsys.readouterr().out
    assert "left out: " in said and "broken.jpg is not a readable image" in said
    assert [row["file"] for row in rows(tmp_path / "out" / "predictions.csv")] == ["a/good.png"]
    for image in (broken, tmp_path / "in"):
        good.unlink(missing_ok=True)
        with pytest.raises(UserError, match=r"broken\.jpg is not a readable image"):
            predict.run(config(place, image, out=tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()


def test_another_backbone_is_refused(place, tmp_path):
    other = dinojax.save(VisionTransformer(TINY, rngs=nnx.Rngs(1)), tmp_path / "other")
    image = next((place / "data" / "test").rglob("*.png"))
    with pytest.raises(UserError, match=r"is not the backbone of .*: its parameters have changed since"):
        predict.run(config(place, image, weights=str(other), out=tmp_path / "out"))
    moved = shutil.copytree(place / "weights", tmp_path / "moved")
    predict.run(config(place, image, weights=str(moved), out=tmp_path / "out", classifiers="knn"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["missing.jpg"], "missing.jpg: there is no such image or folder"),
        (["empty"], "empty holds no images"),
        (["empty", "--run", "elsewhere"], "--run elsewhere: there is no such folder; name a run of `dinojax probe`"),
        (
            ["empty", "--run", "empty"],
            "--run empty is no run and holds no classifiers; name the run folder of a command",
        ),
        (["empty", "--classifiers", "forest"], "--classifiers forest is not among those of"),
        (["empty", "--batch-size", "0"], "--batch-size 0 is not a positive number"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(place, tmp_path, monkeypatch, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    run = [] if "--run" in flags else ["--run", str(place / "run")]
    with pytest.raises(SystemExit) as stop:
        predict.main([*flags, *run, "--out", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_classifiers_of_an_earlier_version_are_named(place, tmp_path):
    """They were kept without the mean and deviation of their images."""
    run = shutil.copytree(place / "run", tmp_path / "run")
    index = json.loads((run / "classifiers.json").read_text())
    for name in ("normalisation", "files_sha256", "document_sha256"):
        del index[name]
    (run / "classifiers.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"classifiers\.json was written by an earlier version.*repeat that run"):
        predict.run(config(place, next((place / "data" / "test").rglob("*.png")), run=run, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_index_says_how_to_make_the_features(place):
    index = json.loads((place / "run" / "classifiers.json").read_text())
    model, imagenet = dinojax.load(place / "weights"), [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    extractor = FeatureExtractor(model, normalisation=imagenet, image_size=16, cache_dir=place / "unused")
    assert index["weights_fingerprint"] == extractor.fingerprint
    assert index["normalisation"] == imagenet
    assert index["weights"] == str((place / "weights").resolve())
    assert index["class_names"] == [f"digit {i}" for i in range(10)]
    assert flat(cifar10_probe.Config()).keys() >= {"image_size", "dtype"} <= index.keys()


def test_help_teaches_and_loads_nothing_heavy():
    code = (
        "import sys, runpy\nsys.argv = ['predict', '--help']\n"
        "try: runpy.run_module('experiments.predict', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('loaded:', sorted({'torch', 'tensorflow', 'matplotlib', 'sklearn', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert "loaded: []" in done.stdout
    for word in ("--run", "--classifiers", "--weights", "cat.jpg"):
        assert word in done.stdout
