"""Each task as a command, against features from the model itself; mistakes as one sentence."""

import csv
import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dinojax
from dinojax import Preprocessing, UserError, VisionTransformer, ViTConfig, patches
from experiments import patches as command
from experiments.patch_tasks.anomaly import AnomalyConfig, run_anomaly
from experiments.patch_tasks.discover import DiscoverConfig, run_discover
from experiments.patch_tasks.foreground import ForegroundConfig, run_foreground
from experiments.patch_tasks.match import MatchConfig, run_match
from experiments.runs.settings import create

TINY = ViTConfig(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3)
MODEL = VisionTransformer(TINY, rngs=nnx.Rngs(0), preprocessing=Preprocessing(patch_size=4, image_size=16))
tokens = jax.jit(lambda images: MODEL.get_intermediate_layers(images, reshape=True)[0])
keys = jax.jit(lambda images: MODEL.get_last_keys(images))


def picture(height, width, seed=0):
    """Smooth colours, so that patches differ as those of photographs do."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def planted(height, width, seed=0):
    """A picture with a bright square of stripes, and where it is."""
    pixels, mask = np.array(picture(height, width, seed)) // 3, np.zeros((height, width), np.uint8)
    mask[8:24, 8:24] = 255
    pixels[8:24, 8:24] = np.where((np.arange(16) % 4 < 2)[:, None, None], [255, 250, 60], [250, 20, 200])
    return Image.fromarray(pixels), Image.fromarray(mask)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("patches")
    dinojax.save(MODEL, place / "model")
    picture(40, 56).save(place / "one.png")
    picture(33, 32, seed=1).save(place / "other.png")
    (place / "photos").mkdir()
    (place / "masks").mkdir()
    for seed in range(3):
        photo, mask = planted(40, 40, seed)
        photo.save(place / "photos" / f"p{seed}.png")
        mask.save(place / "masks" / f"p{seed}.png")
    return place


def seen(file, size, kind="tokens"):
    """Features by the library itself."""
    images = dinojax.preprocess(file, MODEL, size=size, crop=False)
    return np.asarray((keys if kind == "keys" else tokens)(images))[0]


def rows(file):
    with file.open(newline="") as table:
        return list(csv.reader(table))


def test_matches_are_centres_of_patches_in_pixels_of_the_files(place, tmp_path, capsys):
    files = place / "one.png", place / "other.png"
    run_match(create(MatchConfig, weights=str(place / "model"), first=files[0], second=files[1], image_size=20,
                     least_similarity=-1.0, out=tmp_path / "out"))  # fmt: skip
    features = [seen(file, 20) for file in files]
    assert [one.shape[:2] for one in features] == [(5, 7), (5, 5)]  # 28×20 px, and 20×20 instead of 20×20.6 px
    found = patches.mutual_matches(*(one.reshape(-1, 24) for one in features))
    table = np.array(rows(tmp_path / "out" / "matches.csv")[1:], float)
    assert len(table) == len(found.first) > 3
    scales = (56 / 28, 40 / 20), (32 / 20, 33 / 20)
    for row, one, other, similarity in zip(table, *found):
        places = [(4 * (index % grid.shape[1]) + 2, 4 * (index // grid.shape[1]) + 2)
                  for index, grid in zip((one, other), features)]  # fmt: skip
        expected = [at * scale for pair, by in zip(places, scales) for at, scale in zip(pair, by)]
        np.testing.assert_allclose(row[:4], expected, atol=0.051)
        assert row[4] == pytest.approx(similarity, abs=1e-5)
    assert "2 photos; one.png of 56×40 px is seen at 28×20 px, 7×5 patches of 4 px" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"match.png", "matches.csv", "config.json"}


def test_sizes_that_are_no_whole_patches_are_told(place, tmp_path, capsys):
    run_match(create(MatchConfig, weights=str(place / "model"), first=place / "other.png", second=place / "one.png",
                     image_size=18, out=tmp_path / "out"))  # fmt: skip
    assert "note: 18×19 px are not whole patches of 4 px; both sides are rounded" in capsys.readouterr().out


def test_objects_are_boxes_in_the_file_and_masks_of_its_size(place, tmp_path):
    files = place / "photos"
    run_discover(create(DiscoverConfig, weights=str(place / "model"), photos=(files,), image_size=32, tau=0.5,
                        out=tmp_path / "out"))  # fmt: skip
    table = rows(tmp_path / "out" / "boxes.csv")[1:]
    assert len(table) == 6
    for seed in range(3):
        features = seen(files / f"p{seed}.png", 32, "keys")
        for method, found in (("lost", patches.lost(features)), ("token_cut", patches.token_cut(features, tau=0.5))):
            (row,) = [row for row in table if row[0].endswith(f"p{seed}.png") and row[1] == method]
            top, left, bottom, right = (5 * edge for edge in found.box)  # 40 px are 8 patches
            np.testing.assert_allclose(np.array(row[2:], float), [left, top, right, bottom], atol=0.051)
            mask = np.asarray(Image.open(tmp_path / "out" / f"{method}_p{seed}.png"))
            np.testing.assert_array_equal(mask, 255 * np.kron(found.mask, np.ones((5, 5))))
    assert (tmp_path / "out" / "discover.png").is_file()


def test_the_probe_s_iou_is_of_photos_that_it_has_not_seen(place, tmp_path, capsys):
    settings = {"weights": str(place / "model"), "photos": (place / "photos",), "image_size": 40}
    overlap = run_foreground(create(ForegroundConfig, **settings, masks=place / "masks", out=tmp_path / "probe"))
    features = [seen(place / "photos" / f"p{seed}.png", 40) for seed in range(3)]
    inside = np.zeros((10, 10), bool)
    inside[2:6, 2:6] = True
    for left_out in range(3):
        others = [index for index in range(3) if index != left_out]
        head = patches.fit_foreground([features[index] for index in others], [inside] * 2)
        above = patches.foreground_probability(head, features[left_out]) > 0.5
        expected = (above & inside).sum() / (above | inside).sum()
        assert overlap[f"p{left_out}"] == pytest.approx(expected, abs=0.051)
    assert "mean IoU of 3 photos with masks" in capsys.readouterr().out
    whole = patches.foreground_probability(patches.fit_foreground(features, [inside] * 3), features[0])
    small = Image.fromarray(np.rint(255 * whole).astype(np.uint8))
    score = np.asarray(Image.open(tmp_path / "probe" / "p0.png")).astype(int)
    np.testing.assert_allclose(score, small.resize((40, 40), Image.Resampling.BILINEAR), atol=1)
    by_pca = run_foreground(create(ForegroundConfig, **settings, out=tmp_path / "pca"))
    assert set(by_pca.values()) == {None}


def category(folder):
    """A category in MVTec's layout, of ten photos."""
    for seed in range(4):
        (folder / "train" / "good").mkdir(parents=True, exist_ok=True)
        picture(40, 40, seed % 2).save(folder / "train" / "good" / f"{seed}.png")
    for kind in ("test/good", "test/stripes", "ground_truth/stripes"):
        (folder / kind).mkdir(parents=True)
    for seed in range(3):
        picture(40, 40, seed).save(folder / "test" / "good" / f"{seed}.png")
        photo, mask = planted(40, 40, seed)
        photo.save(folder / "test" / "stripes" / f"{seed}.png")
        mask.save(folder / "ground_truth" / "stripes" / f"{seed}_mask.png")
    return folder


def test_anomalies_are_distances_to_a_coreset_of_the_normal_photos(place, tmp_path, capsys):
    folder = category(tmp_path / "bottle")
    settings = {"weights": str(place / "model"), "image_size": 40, "sigma_px": 1.0}
    result = run_anomaly(create(AnomalyConfig, **settings, folder=folder, coreset=0.25, out=tmp_path / "out"))
    normal = np.concatenate([seen(folder / "train" / "good" / f"{seed}.png", 40).reshape(-1, 24) for seed in range(4)])
    bank = normal[patches.coreset(normal, 100)]
    scores, truth = {}, {}
    for kind in ("good", "stripes"):
        for seed in range(3):
            distances = patches.patch_distances(seen(folder / "test" / kind / f"{seed}.png", 40), bank)
            scores[f"{kind}/{seed}.png"] = patches.anomaly_map(distances, 40, 40, sigma_px=1)
            truth[f"{kind}/{seed}.png"] = kind == "stripes"
    table = rows(tmp_path / "out" / "scores.csv")[1:]
    assert [float(row[2]) for row in table] == sorted((float(row[2]) for row in table), reverse=True)
    for path, kind, score in table:
        assert float(score) == pytest.approx(scores["/".join(path.split("/")[-2:])].max(), abs=1e-5)
        assert kind == path.split("/")[-2]
    pairs = [(scores[a].max(), scores[b].max()) for a in truth for b in truth if truth[a] and not truth[b]]
    assert result["image_auroc"]["value"] == pytest.approx(np.mean([one > other for one, other in pairs]), abs=1e-9)
    low, high = result["pixel_auroc"]["interval"]
    assert 0 <= low <= result["pixel_auroc"]["value"] + 1e-3 and result["pixel_auroc"]["value"] - 1e-3 <= high <= 1
    assert result["bank"] == 100 and json.loads((tmp_path / "out" / "result.json").read_text())["bank"] == 100
    assert "400 patches of normal photos, of which 100 are kept; 6 to test" in capsys.readouterr().out
    flat = create(AnomalyConfig, **settings, normal=folder / "train", test=folder / "test" / "good", coreset=1.0,
                  out=tmp_path / "flat")  # fmt: skip
    found = run_anomaly(flat)
    assert found["bank"] == 400 and "image_auroc" not in found
    assert min(float(row[2]) for row in rows(tmp_path / "flat" / "scores.csv")[1:]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda p: create(AnomalyConfig, weights="w"), "give a category in MVTec's layout, or both"),
        (lambda p: create(AnomalyConfig, weights="w", folder=p / "photos"), "does not hold train/good and test"),
        (lambda p: create(AnomalyConfig, weights="w", folder=p, normal=p), "FOLDER and --normal or --test were given"),
        (lambda p: create(ForegroundConfig, weights="w", photos=()), "no photos were given"),
        (lambda p: create(ForegroundConfig, weights="w", photos=(p / "one.png",), masks=p / "masks"),
         "holds no file with the stem of a photo, such as one.png"),
        (lambda p: create(ForegroundConfig, weights="w", photos=(p / "one.png",), method="probe"),
         "--method probe needs masks to learn from"),
        (lambda p: create(DiscoverConfig, weights="w", photos=(p / "none.png",)), "there is no such image or folder"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_sentence(place, config, message):
    config = config(place)
    run = {AnomalyConfig: run_anomaly, ForegroundConfig: run_foreground, DiscoverConfig: run_discover}[type(config)]
    with pytest.raises(UserError, match=message):
        run(config)


def test_every_task_has_help_and_others_are_refused(capsys):
    command.main(["--help"])
    assert "match,track,foreground,discover,anomaly" in capsys.readouterr().out
    for task in command.TASKS:
        with pytest.raises(SystemExit) as stop:
            command.main([task, "--help"])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        assert f"experiments.patches {task}" in shown and "--image-size" in shown and "RUN_OR_WEIGHTS" in shown
    with pytest.raises(SystemExit) as stop:
        command.main(["trak"])
    assert stop.value.code == 2
    assert "there is no task 'trak'; did you mean track?" in capsys.readouterr().err
