"""DINO on a folder of images without labels: what is trained on, monitored, refused, and read before the end."""

import contextlib
import io
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

from dinojax import UserError, load
from dinojax.checkpoint import TrainingCheckpoints
from dinojax.models.files import named_parameters
from dinojax.pretraining.augment import MultiCropConfig
from experiments import pretrain_folder
from experiments.data.unlabelled import load_images
from experiments.features.backbones import find_networks, load_backbone
from experiments.pretraining.config import PretrainConfig
from experiments.pretraining.data import read_stored
from experiments.pretraining.loop import pretrain
from experiments.pretraining.program import make_program
from experiments.runs.lock import RunLock
from experiments.runs.log import read_log
from experiments.runs.settings import create, replace

IMAGES, SIDE, STEPS_PER_EPOCH, EPOCHS = 40, 12, 4, 2
CROPS = MultiCropConfig(global_size=SIDE, local_size=8, local_crops=1)
TINY = create(
    PretrainConfig, data="", recipe="small", crops=CROPS, batch_size=8, epochs=EPOCHS, patch_size=4, embed_dim=16,
    depth=1, num_heads=2, prototypes=16, head_hidden_dim=16, bottleneck_dim=8, warmup_epochs=1, knn_every=1,
    log_every=2, own_statistics=True,
)  # fmt: skip


def photos(folder, *, nested=False, sizes=((SIDE, SIDE),)):
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        path = folder / (f"{i // 8}/{i:03}.png" if nested else f"{i:03}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Spots of random colours, so that images differ by more than noise.
        image = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8)).resize(sizes[i % len(sizes)])
        image.save(path)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def finished(place):
    """The run on the flat folder, what it returned, and what it said."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        result = pretrain(replace(TINY, data=photos(place / "flat"), out=place / "whole"))
    return result, said.getvalue()


@pytest.fixture(scope="module")
def whole(finished):
    return finished[0].folder


@pytest.fixture(scope="module")
def stopped(place):
    """The run on the nested folder, stopped after two steps, and its settings."""
    config = replace(TINY, data=photos(place / "nested", nested=True), out=place / "stopped")
    assert pretrain(replace(config, minutes=1e-9)).rank_me is None
    return config


def test_the_networks_of_a_training_that_has_not_ended_are_those_of_its_checkpoint(stopped, tmp_path, capsys):
    """Compared with the whole state, which the training itself restores; the lock is held meanwhile."""
    folder = stopped.folder
    with TrainingCheckpoints(folder / "checkpoints") as checkpoints:
        state = checkpoints.restore(jax.eval_shape(make_program(stopped, STEPS_PER_EPOCH).init)).state
    before = sorted(path.name for path in folder.rglob("*"))
    with RunLock(folder):
        for name, kept in (("teacher", state.teacher), ("student", state.student)):
            found = load_backbone(str(folder), network=name, seed=0, cache_dir=tmp_path)
            expected = nnx.to_flat_state(kept["backbone"])
            arrays = named_parameters(found.model)
            assert len(arrays) == len(expected)
            for path, value in expected:
                np.testing.assert_array_equal(arrays[".".join(map(str, path))], value[...])
            assert found.weights == f"{folder}/checkpoints/step_2/{name}" and found.source["step"] == 2
            assert f"has not ended: {name} of step 2 of 8" in capsys.readouterr().out
            assert found.image_size == SIDE
    assert sorted(path.name for path in folder.rglob("*")) == before
    images = load_images(stopped.dataset.data).train
    pixels = np.stack([images.read(i) for i in range(len(images))]) / 255
    np.testing.assert_allclose(found.normalisation, [pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))], rtol=1e-6)


def test_a_stopped_run_on_a_nested_folder_ends_with_the_bits_of_the_flat_one(whole, stopped):
    folder = pretrain(stopped).folder
    for name in ("teacher", "student"):
        one, other = (load_file(run / name / "model.safetensors") for run in (folder, whole))
        assert all(np.array_equal(one[key], other[key]) for key in one | other)
    logs = [[{k: v for k, v in line.items() if k != "seconds"} for line in read_log(run)] for run in (folder, whole)]
    assert logs[0] == logs[1]
    assert list(find_networks(str(folder)).values()) == [str(folder / name) for name in ("teacher", "student")]


def test_rank_me_of_the_held_out_images_is_what_its_definition_says(whole):
    """From the saved networks, pixel by pixel, with NumPy's singular values."""
    config, result = (json.loads((whole / f"{name}.json").read_text()) for name in ("config", "result"))
    held_out = load_images(config["data"]).test
    assert result["monitored_images"] == len(held_out) == 8
    for name in ("teacher", "student"):
        model = load(whole / name)
        mean, std = np.array(model.preprocessing.mean), np.array(model.preprocessing.std)
        pixels = np.stack([(held_out.read(i) / 255 - mean) / std for i in range(8)]).astype(np.float32)
        values = np.linalg.svd(np.asarray(model(pixels).cls_token, np.float64), compute_uv=False)
        share = values / values.sum() + 1e-7
        assert result["rank_me"][name] == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-5)
    measured = [line["rank_me"] for line in read_log(whole) if "rank_me" in line]
    assert len(measured) == EPOCHS + 1
    assert measured[0] == pytest.approx(result["rank_me"]["random_init"], rel=1e-5)
    assert measured[-1] == pytest.approx(result["rank_me"]["teacher"], rel=1e-5)


def test_without_labels_nothing_speaks_of_them(finished, capsys):
    result, said = finished
    assert "has no labels" in said and "32 images train, 8 are held out" in said
    assert "test k-NN" not in said and "feature rank (RankMe, at most 8) on 8 held-out images: teacher " in said
    assert result.test_knn_accuracy is None and set(result.rank_me) == {"teacher", "student", "random_init"}
    folder = result.folder
    assert not any("knn_accuracy" in line for line in read_log(folder))
    assert not (folder / "evaluation").exists() and (folder / "curves.png").is_file()
    with TrainingCheckpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.steps == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]
    manifest = json.loads((folder / "checkpoints" / "step_8" / "manifest" / "metadata").read_text())
    assert manifest["score"] is None
    pretrain(replace(TINY, data=str(folder.parent / "flat"), out=folder))
    assert "is finished" in capsys.readouterr().out


def test_a_folder_that_has_changed_is_refused(whole, tmp_path):
    config = json.loads((whole / "config.json").read_text())
    recorded = json.loads((whole / "data.json").read_text())
    assert recorded["class_names"] == [] and list(recorded["splits"]) == ["train", "held_out"]
    more = Path(config["data"]) / "zebra.png"
    Image.new("RGB", (SIDE, SIDE)).save(more)
    try:
        with pytest.raises(UserError, match=r"the train images are not those that .* was made with \(32 then, 33 now"):
            pretrain(replace(TINY, data=config["data"], out=whole))
    finally:
        more.unlink()


def test_images_of_several_sizes_are_squared_once(tmp_path, capsys):
    """As Pillow resizes and crops them."""
    data = photos(tmp_path / "mixed", sizes=((20, 30), (31, 17), (14, 14)))
    config = replace(TINY, data=data)
    dataset = load_images(data)
    images, side = read_stored(dataset, config)
    assert side == 14 and images.shape == (32, 14, 14, 3)  # 8/7 of the crops' 12 px
    said = capsys.readouterr().out
    assert (
        "note: the images have several sizes (such as " in said and "stored as squares of 14 px (--image-size)" in said
    )
    for i in range(0, 32, 5):
        with Image.open(dataset.train.files[i]) as image:
            scale = 14 / min(image.size)
            resized = image.resize([int(length * scale) for length in image.size], Image.Resampling.BICUBIC)
        left, top = (round((length - 14) / 2) for length in resized.size)
        np.testing.assert_array_equal(images[i], np.asarray(resized.crop((left, top, left + 14, top + 14))))
    assert read_stored(dataset, replace(config, image_size=9))[0].shape == (32, 9, 9, 3)


def test_images_of_one_size_are_stored_as_they_are_unless_they_are_large(tmp_path, capsys):
    data = load_images(photos(tmp_path / "wide", sizes=((30, 20),)))
    images, side = read_stored(data, TINY)
    assert side is None and images.shape == (32, 20, 30, 3) and not capsys.readouterr().out
    np.testing.assert_array_equal(images[3], data.train.read(3))
    data = load_images(photos(tmp_path / "large", sizes=((50, 49),)))
    assert read_stored(data, TINY)[1] == 14
    assert "note: the images have 50×49 px; they are stored as squares of 14 px" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        (
            {"batch_size": 100},
            "--batch-size 100 is more than the 32 training images (8 more are held out); give --batch-size 32",
        ),
        (
            {"batch_size": 60, "accumulation_steps": 5},
            "than the 32 training images (8 more are held out); give --batch-size 30",
        ),
    ],
)
def test_fewer_images_than_a_batch_name_the_way(changes, way, tmp_path):
    config = replace(TINY, data=photos(tmp_path / "few"), out=tmp_path / "run", **changes)
    with pytest.raises(UserError, match=re.escape(way)):
        pretrain(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("side", "recipe"), [(12, "small32"), (80, "small64"), (130, "reported")])
def test_the_recipe_follows_from_the_size_of_the_images(side, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", sizes=((side, side), (side + 9, side)))
    with pytest.raises(SystemExit) as stop:
        pretrain_folder.main(["photos", "--epochs", "0"])
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err == "error: --epochs 0 is not a positive number\n"
    assert said.out == f"recipe {recipe}, for images of about {side} px\n"


def test_each_folder_has_runs_of_its_own(tmp_path, monkeypatch, capsys):
    """The run folder is named where it cannot be made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    named = []
    for name in ("one/photos", "other/photos"):
        photos(tmp_path / name)
        with pytest.raises(SystemExit):
            pretrain_folder.main([name, "smoke", "--seed", "3", "--batch-size", "8"])
        named += re.findall(r"--out (\S+) cannot be written", capsys.readouterr().err)
    assert len(set(named)) == 2
    assert all(re.fullmatch(r"runs/pretrain_folder/photos-[0-9a-f]{6}/smoke-seed3", folder) for folder in named)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "no folder was given; name the folder of images first"),
        (["--epochs", "3"], "no folder was given"),
        (["missing"], "missing: there is no such folder; name the folder of images first, then the recipe"),
        (["empty"], "empty holds no images"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        pretrain_folder.main(words)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in said and said.count("\n") == 1
