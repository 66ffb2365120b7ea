"""Copy detection on a small folder laid out as Copydays: scores as upstream computes them."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import dinojax
from dinojax import VisionTransformer, ViTConfig
from dinojax.retrieval import fit_whitening, whiten
from experiments import copydays
from experiments.runs.settings import create

TINY = ViTConfig(img_size=28, patch_size=7, embed_dim=16, depth=1, num_heads=2, init_values=1.0)
PHOTOS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Twelve photos, copies of three kinds, other photos, and a small backbone."""
    place = tmp_path_factory.mktemp("copydays")
    random = np.random.default_rng(0)
    for folder in ("data/original", "data/strong", "data/jpegqual/3", "data/crops/50", "others"):
        (place / folder).mkdir(parents=True)
    for i in range(PHOTOS):
        photo = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((70, 50))
        name = f"20{i:02d}00.jpg"
        photo.save(place / "data/original" / name, quality=95)
        photo.save(place / "data/jpegqual/3" / name, quality=3)
        photo.crop((9, 7, 61, 43)).save(place / "data/crops/50" / name, quality=95)
        for copy in range(i % 3):
            photo.rotate(20 * copy + 160).save(place / "data/strong" / f"20{i:02d}{copy + 1:02d}.jpg", quality=95)
    for i in range(40):
        noise = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((60, 40)).save(place / f"others/{i}.png")
    dinojax.save(VisionTransformer(TINY, rngs=nnx.Rngs(0)), place / "weights")
    return place


def run(place, out, **changes):
    options = {"weights": str(place / "weights"), "data": place / "data", "image_size": 28, "out": out} | changes
    return copydays.run(create(copydays.Config, **options))


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, state, images):
    return nnx.merge(graphdef, state)(images)


def feature(model, file) -> np.ndarray:
    pixels = np.asarray(Image.open(file).convert("RGB").resize((28, 28), Image.Resampling.BICUBIC))
    features = _forward(*nnx.split(model), dinojax.normalize(pixels[None], model))
    pooled = (np.maximum(np.asarray(features.patch_tokens, np.float64)[0], 1e-6) ** 4).mean(axis=0) ** 0.25
    return np.concatenate([np.asarray(features.cls_token, np.float64)[0], pooled])


def upstream(place, *, whitened: bool = False, distractors: bool = False) -> dict[str, float]:
    """`eval_copy_detection.py` as loops in float64."""
    model = dinojax.load(place / "weights")
    originals = sorted((place / "data/original").iterdir())
    others = [feature(model, file) for file in sorted((place / "others").iterdir())]
    bank = np.array([feature(model, file) for file in originals] + others * distractors)
    mean, projection = np.zeros(32), np.eye(32)
    if whitened:
        x = np.array(others)
        mean = x.mean(axis=0)
        variances, directions = np.linalg.eigh(x.T @ x / len(x))
        variances = np.maximum(variances, 1e-5 * variances.max())
        projection = np.diag(variances**-0.5) @ directions.T
    bank = (bank - mean) @ projection.T
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    found = {}
    for name in ("original", "strong", "jpegqual/3", "crops/50"):
        areas = []
        for file in sorted((place / "data" / name).iterdir()):
            query = (feature(model, file) - mean) @ projection.T
            ranking = np.argsort(-bank @ query)[:20]
            belongs = file.name[:4] if name == "strong" else file.name
            good = [i for i, original in enumerate(originals) if original.name.startswith(belongs)]
            places = [place for place, image in enumerate(ranking) if image in good]
            steps = [((count / at if at else 1) + (count + 1) / (at + 1)) / 2 for count, at in enumerate(places)]
            areas.append(sum(steps) / len(good))
        found[name] = float(np.mean(areas))
    return found


def test_scores_are_those_of_loops(place, tmp_path, capsys):
    result = run(place, tmp_path / "out")
    assert result == pytest.approx(upstream(place), abs=1e-6)
    assert result["original"] == 1 and 0 < result["strong"] < 1
    assert json.loads((tmp_path / "out/result.json").read_text())["mean_average_precision"] == result
    said = capsys.readouterr().out
    assert "holds no jpegqual/5, " in said and "strong          12 copies" in said


def test_distractors_and_whitening_are_upstreams(place, tmp_path):
    result = run(place, tmp_path / "out", distractors=place / "others", whitening=place / "others")
    expected = upstream(place, whitened=True, distractors=True)
    assert result == pytest.approx(expected, abs=1e-6)
    assert result != pytest.approx(upstream(place, distractors=True), abs=1e-3)


def test_a_whitening_with_the_mean_left_in_is_upstreams():
    random = np.random.default_rng(0)
    learned, given = random.standard_normal((50, 6)) + 2, random.standard_normal((4, 6))
    variances, directions = np.linalg.eigh(learned.T @ learned / 50)
    expected = (given - learned.mean(axis=0)) @ directions / np.sqrt(variances)
    found = whiten(given, fit_whitening(learned, centred=False))
    np.testing.assert_allclose(np.abs(found), np.abs(expected[:, ::-1]), rtol=1e-5)
    assert not np.allclose(np.abs(found), np.abs(whiten(given, fit_whitening(learned))), rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "nowhere is not Copydays: nowhere/original with .jpg files was expected"),
        ({"whitening": "nowhere"}, "nowhere: there is no such image or folder"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(place, tmp_path, monkeypatch, changes, message):
    with pytest.raises(dinojax.UserError, match=message):
        run(place, tmp_path / "out", **{name: Path(value) for name, value in changes.items()})
    assert not (tmp_path / "out").exists()


def test_a_copy_without_an_original_is_named(place, tmp_path):
    for folder in ("original", "strong"):
        (tmp_path / folder).mkdir()
    photo = Image.fromarray(np.zeros((9, 9, 3), np.uint8))
    photo.save(tmp_path / "original/200000.jpg")
    with pytest.raises(dinojax.UserError, match="holds no copies beside original"):
        run(place, tmp_path / "out", data=tmp_path)
    photo.save(tmp_path / "strong/201001.jpg")
    with pytest.raises(dinojax.UserError, match=r"strong/201001\.jpg is a copy without an original"):
        run(place, tmp_path / "out", data=tmp_path)
