"""Training a dense head and using it: scores are those of the masks it writes, and mistakes are one sentence."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dinojax
from dinojax import Preprocessing, UserError, VisionTransformer, ViTConfig
from dinojax.dense import Blend
from experiments import dense, predict, summarize
from experiments.data.splits import Split
from experiments.dense_tasks.config import DenseConfig
from experiments.dense_tasks.task import make_task, window_data
from experiments.dense_tasks.windows import Geometry, window_split, windows_of
from experiments.runs.settings import create

TINY = ViTConfig(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2)
HEIGHT, WIDTH, SIDE = 32, 48, 16  # px of a photo, and of the windows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Photos with a red and a green block on noise, their masks and depth maps, and a model with random weights."""
    place = tmp_path_factory.mktemp("dense")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 5)):
        for part in ("images", "masks", "depth"):
            (place / "set" / split / part).mkdir(parents=True)
        for i in range(count):
            pixels, mask = rng.integers(0, 90, (HEIGHT, WIDTH, 3), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8)
            for label in (1, 2):
                top, left = 8 * rng.integers(0, 3), 8 * rng.integers(0, 5)
                pixels[top : top + 8, left : left + 8, label - 1] = 250
                mask[top : top + 8, left : left + 8] = label
            mask[:, -1] = 255
            depth = np.where(mask == 1, 3000, 1000).astype(np.uint16)
            depth[mask == 255] = 0
            for part, array in (("images", pixels), ("masks", mask), ("depth", depth)):
                Image.fromarray(array).save(place / "set" / split / part / f"{i}.png")
    preprocessing = Preprocessing(image_size=SIDE, patch_size=4)
    dinojax.save(VisionTransformer(TINY, rngs=nnx.Rngs(0), preprocessing=preprocessing), place / "model")
    return place


def config(place, **changes):
    options = {"folder": place / "set", "weights": str(place / "model"), "image_size": HEIGHT, "window": SIDE,
               "epochs": 12, "batch_windows": 8, "learning_rate": 0.05, "cache_dir": place / "cache",
               "out": place / "run", **changes}  # fmt: skip
    return create(DenseConfig, **options)


@pytest.fixture(scope="module")
def run(place):
    dense.run(config(place))
    return json.loads((place / "run" / "result.json").read_text())


def predicted(place, folder, **changes):
    options = {"image": place / "set" / "val" / "images", "run": folder, "cache_dir": place / "other", **changes}
    return predict.run(create(predict.Config, **options))


def test_the_scores_are_those_of_the_masks_that_predict_writes(place, run, tmp_path):
    """A loop over the written files, of which nothing comes from the code that scores."""
    files = predicted(place, place / "run", out=tmp_path / "out")
    both, either, right, total = np.zeros(3), np.zeros(3), 0, 0
    for i in range(5):
        with Image.open(files[f"{i}.png"]) as image:
            assert image.mode == "P" and image.size == (WIDTH, HEIGHT)
            found = np.asarray(image)
        truth = np.asarray(Image.open(place / "set" / "val" / "masks" / f"{i}.png"))
        valid = truth != 255
        for label in range(3):
            both[label] += (valid & (found == label) & (truth == label)).sum()
            either[label] += (valid & ((found == label) | (truth == label))).sum()
        right, total = right + (found == truth)[valid].sum(), total + valid.sum()
    assert run["validation"]["mean_iou"] == pytest.approx((both / either).mean(), rel=1e-12)
    assert list(run["validation"]["class_iou"].values()) == pytest.approx(list(both / either), rel=1e-12)
    assert run["validation"]["pixel_accuracy"] == pytest.approx(right / total, rel=1e-12)
    low, high = run["validation"]["mean_iou_interval"]
    assert low <= run["validation"]["mean_iou"] <= high
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        shares = [float(row["share"]) for row in csv.DictReader(file) if row["file"] == "0.png"]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"0_mask.png", "0_overlay.png", "predictions.png"}


def test_the_head_learns_the_blocks(run):
    """A third of the pixels of the two classes would be found by chance; random weights keep their colours."""
    assert run["validation"]["mean_iou"] > 0.7
    losses = [epoch["train_loss"] for epoch in run["epochs"]]
    assert losses[-1] < 0.5 * losses[0]
    best = max(run["epochs"], key=lambda epoch: epoch["mean_iou"])
    assert run["best_epoch"] == best["epoch"]
    assert "there are no test images" in run["bias"]


def test_the_run_folder_is_complete(place, run):
    names = {path.name for path in (place / "run").iterdir() if path.is_file()}
    assert names == {"config.json", "result.json", "dense.json", "head.safetensors", "curves.png", "examples.png",
                     "classes.png"}  # fmt: skip


def test_cached_features_give_the_same_run(place, run, tmp_path, capsys):
    dense.run(config(place, out=tmp_path / "again"))
    again = json.loads((tmp_path / "again" / "result.json").read_text())
    assert again["validation"] == run["validation"]
    assert [e["train_loss"] for e in again["epochs"]] == [e["train_loss"] for e in run["epochs"]]


def test_features_and_targets_of_a_window_are_those_of_its_pixels(place):
    """Computed by the model itself, without the extractor; two blocks, and mirror images."""
    task = make_task(config(place, blocks=2, mirror=True, image_size=SIDE + 8))
    data = window_data(task)["train"]
    index = next(i for i, w in enumerate(data.windows) if w.mirrored and w.photo == 3 and w.left > 0)
    window = data.windows[index]
    folder = place / "set" / "train"
    photo, mask = Image.open(folder / "images" / "3.png"), Image.open(folder / "masks" / "3.png")
    size = (36, 24)  # 48 × 32 px with a shorter side of 24 px, in patches of 4 px
    place_of = np.s_[4 * window.top : 4 * window.top + SIDE, 4 * window.left : 4 * window.left + SIDE]
    pixels = np.asarray(photo.resize(size, Image.Resampling.BICUBIC))[place_of][:, ::-1]
    truth = np.asarray(mask.resize(size, Image.Resampling.NEAREST))[place_of][:, ::-1]
    np.testing.assert_array_equal(data.targets[index], truth)
    model = task.backbone.model
    layers = model.get_intermediate_layers(dinojax.normalize(pixels[None], model), n=2, reshape=True)
    np.testing.assert_allclose(data.features[index], np.concatenate(layers, axis=-1)[0], rtol=1e-3, atol=1e-3)


def test_windows_of_a_large_photo_make_up_the_whole():
    """With patches' mean colours for features, blended windows are the mean colours of the resized photo."""
    pixels = np.random.default_rng(0).integers(0, 255, (90, 61, 3), np.uint8)
    split = Split("new", ["a"], np.zeros(1, np.int64), lambda _: pixels, "fingerprint")
    geometry = Geometry(image_size=43, window=16, overlap=0.3, patch=4)
    windows = windows_of([(90, 61)], geometry, 1.5)
    tiles = window_split(split, windows, geometry, 1.5)
    rows, columns = geometry.grid((90, 61), 1.5)
    blend = Blend(rows, columns, 3)
    for i, window in enumerate(windows):
        tile = tiles.read(i)
        assert tile.shape == (16, 16, 3)
        blend.add(tile.reshape(4, 4, 4, 4, 3).mean(axis=(1, 3)).astype(np.float32), window.top, window.left)
    whole = np.asarray(Image.fromarray(pixels).resize((4 * columns, 4 * rows), Image.Resampling.BICUBIC))
    expected = whole.reshape(rows, 4, columns, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(blend.scores(), expected, rtol=0, atol=1e-3)


def test_larger_photos_and_several_scales_are_predicted_at_their_own_size(place, run, tmp_path):
    Image.open(place / "set" / "val" / "images" / "0.png").resize((130, 75)).save(tmp_path / "large.png")
    options = {"image": tmp_path / "large.png", "scales": (1.0, 2.0), "overlap": 0.5}
    (file,) = predicted(place, place / "run", out=tmp_path / "out", **options).values()
    with Image.open(file) as image:
        assert image.size == (130, 75)


@pytest.mark.slow  # a whole training
def test_depth_is_learned_scored_and_written(place, tmp_path):
    dense.run(config(place, task="depth", bins=16, out=tmp_path / "run", scales=(1.0, 1.5)))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    files = predicted(place, tmp_path / "run", out=tmp_path / "out")
    errors = []
    for i in range(5):
        found = np.load(files[f"{i}.png"])
        truth = np.asarray(Image.open(place / "set" / "val" / "depth" / f"{i}.png")) / 1000
        p, t = found[truth > 0].astype(float), truth[truth > 0]
        errors.append(
            [np.sqrt(((p - t) ** 2).mean()), (abs(p - t) / t).mean(), (np.maximum(p / t, t / p) < 1.25).mean()]
        )
    scores = [result["validation"][name] for name in ("rmse", "abs_rel", "delta1")]
    np.testing.assert_allclose(scores, np.mean(errors, axis=0), rtol=1e-6)
    assert result["validation"]["abs_rel"] < 0.2


MISTAKES = {
    "epochs": ({"epochs": 0}, "--epochs 0 is not a positive number"),
    "blocks": ({"blocks": 3}, "--blocks 3 is more than the 2 blocks"),
    "window": ({"window": 64}, "--window 64 is larger than --image-size 32"),
    "size": ({"image_size": 2, "window": None}, "--image-size 2 is smaller than one patch"),
    "scales": ({"scales": (0.0,)}, "--scales"),
    "range": ({"task": "depth", "min_depth": 5.0}, "reach 3 m, not above --min-depth 5"),
    "folder": ({"folder": "nowhere"}, "there is no such folder"),
    "table": ({"classes": "nowhere.csv"}, "nowhere.csv is not a table of classes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(place, tmp_path, mistake):
    changes, words = MISTAKES[mistake]
    changes = {name: Path(value) if name in ("folder", "classes") else value for name, value in changes.items()}
    with pytest.raises(UserError, match=words):
        dense.run(config(place, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_head_is_used_with_its_own_backbone_alone(place, run, tmp_path):
    other = VisionTransformer(TINY, rngs=nnx.Rngs(1), preprocessing=Preprocessing(image_size=SIDE, patch_size=4))
    dinojax.save(other, tmp_path / "other")
    with pytest.raises(UserError, match="is not the backbone of the run"):
        predicted(place, place / "run", weights=str(tmp_path / "other"), out=tmp_path / "out")
    with pytest.raises(UserError, match="--classifiers knn: a run of `dinojax dense`"):
        predicted(place, place / "run", classifiers="knn", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_edited_head_is_refused(place, run, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "run" / "head.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"head\.safetensors is damaged"):
        predicted(place, tmp_path / "run", out=tmp_path / "out")


def test_runs_of_several_seeds_are_summarised(place, run, tmp_path, capsys):
    dense.run(config(place, out=tmp_path / "seed1", seed=1))
    capsys.readouterr()
    second = json.loads((tmp_path / "seed1" / "result.json").read_text())
    text = summarize.run(summarize.Config((place / "run", tmp_path / "seed1"))).text
    values = 100 * np.array([one["validation"]["mean_iou"] for one in (run, second)])
    assert "## Dense heads" in text
    assert f"{values.mean():.2f} ± {values.std(ddof=1):.2f} (2)" in text
