"""Retrieval on a small folder laid out as revisited Oxford: features and scores as upstream computes them."""

import csv
import json
import pickle

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dinojax
from dinojax import VisionTransformer, ViTConfig
from experiments import landmarks
from experiments.retrieval.features import landmark_features, thumbnail
from experiments.runs.settings import create

TINY = ViTConfig(img_size=28, patch_size=7, embed_dim=16, depth=1, num_heads=2, init_values=1.0)
SIZES = [(60, 90), (33, 47), (60, 90), (60, 90), (60, 90), (33, 47)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Six photos, the last two of which are queries too, and their ground truth; a small backbone."""
    place = tmp_path_factory.mktemp("landmarks")
    random, folder = np.random.default_rng(0), place / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    names = [f"photo_{i}" for i in range(len(SIZES))]
    for name, size in zip(names, SIZES):
        coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(folder / "jpg" / f"{name}.jpg")
    answers = [
        {"bbx": [0.0, 0.0, 9.0, 9.0], "easy": [2], "hard": np.array([0]), "junk": [4]},
        {"bbx": [0.0, 0.0, 9.0, 9.0], "easy": [], "hard": np.array([1, 3]), "junk": []},
    ]
    truth = {"gnd": answers, "imlist": names, "qimlist": names[4:]}
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, 2))
    dinojax.save(VisionTransformer(TINY, rngs=nnx.Rngs(0)), place / "weights")
    return place


def run(place, out, **changes):
    options = {"weights": str(place / "weights"), "data": place, "image_size": 40, "out": out} | changes
    return landmarks.run(create(landmarks.Config, **options))


def upstream_map(ranks, answers) -> float:
    """compute_map of revisited Oxford and Paris, written as loops."""
    areas = []
    for ranking, (good, junk) in zip(ranks, answers):
        if not good:
            continue
        kept = [image for image in ranking if image not in junk]
        area = 0.0
        for count, place in enumerate(sorted(kept.index(image) for image in good)):
            before = 1.0 if place == 0 else count / place
            area += (before + (count + 1) / (place + 1)) / (2 * len(good))
        areas.append(area)
    return float(np.mean(areas))


def test_scores_are_those_of_loops_over_the_models_own_features(place, tmp_path, capsys):
    result = run(place, tmp_path / "out")
    model = dinojax.load(place / "weights")
    features = []
    for i in range(len(SIZES)):
        image = Image.open(place / f"roxford5k/jpg/photo_{i}.jpg").convert("RGB")
        image.thumbnail((40, 40), Image.Resampling.LANCZOS)
        pixels = np.asarray(image)[: image.height // 7 * 7, : image.width // 7 * 7]
        token = dinojax.embed(model, dinojax.normalize(pixels[None], model)).cls[0].astype(np.float64)
        features.append(token / np.linalg.norm(token))
    ranks = [list(np.argsort([-features[query] @ other for other in features])) for query in (4, 5)]
    expected = {
        "easy": upstream_map(ranks, [({2}, {4, 0}), (set(), {1, 3})]),
        "medium": upstream_map(ranks, [({2, 0}, {4}), ({1, 3}, set())]),
        "hard": upstream_map(ranks, [({0}, {4, 2}), ({1, 3}, set())]),
    }
    assert {name: found["mean_average_precision"] for name, found in result.items()} == pytest.approx(expected)
    assert result["easy"]["queries"] == 1 and result["hard"]["queries"] == 2
    assert json.loads((tmp_path / "out/result.json").read_text())["scores"] == result
    with (tmp_path / "out/queries.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["query"] for row in rows] == ["photo_4", "photo_5"] and rows[1]["easy"] == ""
    assert f"{100 * expected['medium']:.2f}" in capsys.readouterr().out


def test_three_scales_are_those_of_interpolate(place):
    """Upstream: F.interpolate(scale_factor=…, bilinear), whose sizes are rounded down, and the mean of the features."""
    torch = pytest.importorskip("torch")
    model = dinojax.load(place / "weights")
    file = place / "roxford5k/jpg/photo_1.jpg"
    found = landmark_features(model, [file], image_size=224, multiscale=True, title="photos")
    pixels = np.asarray(Image.open(file))
    images = torch.from_numpy(np.array(dinojax.normalize(pixels[None], model))).permute(0, 3, 1, 2)
    tokens = []
    for scale in (1, 1 / 2**0.5, 1 / 2):
        resized = images
        if scale != 1:
            resized = torch.nn.functional.interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
        rows, columns = (side // 7 * 7 for side in resized.shape[2:])
        tokens.append(dinojax.embed(model, resized.permute(0, 2, 3, 1).numpy()[:, :rows, :columns]).cls)
    np.testing.assert_allclose(found, np.mean(tokens, axis=0), rtol=0, atol=3e-6)


def test_small_photos_are_not_enlarged():
    assert thumbnail(np.zeros((10, 20, 3), np.uint8), 40).shape == (10, 20, 3)
    assert thumbnail(np.zeros((100, 200, 3), np.uint8), 40).shape == (20, 40, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "rparis6k"}, "is not the folder of rparis6k: gnd_rparis6k.pkl and a folder jpg were expected"),
        ({"image_size": 0}, "--image-size 0 is not a positive number"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(place, tmp_path, changes, message):
    with pytest.raises(dinojax.UserError, match=message):
        run(place, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"imlist": ["../secret"] * 6}, "no list imlist of names of photos"),
        ({"imlist": ["gone", *(f"photo_{i}" for i in range(5))]}, r"gone\.jpg is missing"),
        ({"gnd": []}, "does not answer its 2 queries"),
        ({"gnd": [{"easy": [9], "hard": [], "junk": []}] * 2}, "a list easy that is not one of indices below 6"),
        ({"gnd": [{"easy": [0.5], "hard": [], "junk": []}] * 2}, "a list easy that is not one of indices"),
        ({"gnd": [{"easy": []}] * 2}, "a list hard that is not one of indices"),
    ],
)
def test_a_ground_truth_of_another_form_is_refused(place, tmp_path, damage, message):
    folder = tmp_path / "roxford5k"
    folder.mkdir()
    (folder / "jpg").symlink_to(place / "roxford5k/jpg")
    truth = pickle.loads((place / "roxford5k/gnd_roxford5k.pkl").read_bytes()) | damage
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    with pytest.raises(dinojax.UserError, match=message):
        run(place, tmp_path / "out", data=folder)
