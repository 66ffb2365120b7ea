"""Search with photos: what is found is what the features say; another model is refused; mistakes are one sentence."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

import dinojax
from dinojax import UserError
from experiments import search
from experiments.runs.settings import create
from experiments.search import Config
from tests.support import embedded_images
from tests.support.embedded_images import HOSTILE, picture


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a model, the embedding file, and photos from elsewhere."""
    place = tmp_path_factory.mktemp("search")
    names = embedded_images.make_images(place / "images")
    model = embedded_images.make_model(place / "model")
    embedded_images.make_model(place / "other", seed=1)
    embedded_images.make_table(place / "table.parquet", place / "images", names, model, place / "model")
    picture(3).save(place / "copy.png")  # the pixels of images/deep/3.png
    picture(99, 31, 17).save(place / "new.jpg")
    return place


def config(place, *photos, **changes):
    options = {"table": place / "table.parquet", "out": place / "out", "cache_dir": place / "cache", "k": 3} | changes
    return create(Config, photos=photos, **options)


def features(place, files, name="cls"):
    model = dinojax.load(place / "model")
    found = dinojax.embed(model, dinojax.preprocess(files, model, size=16))._asdict()[name].astype(np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("feature", ["cls", "mean_patch"])
def test_results_are_those_of_the_features(place, tmp_path, capsys, feature):
    names = [*(f"deep/{i}.png" for i in range(7)), HOSTILE]
    hits = search.run(config(place, place / "new.jpg", place / "copy.png", out=tmp_path / "out", feature=feature))
    bank = features(place, [place / "images" / name for name in names], feature)
    for one, file in zip(hits, ("new.jpg", "copy.png")):
        expected = (features(place, [place / file], feature) @ bank.T)[0]
        order = np.argsort(-expected, kind="stable")[:3]
        assert one.indices == order.tolist() and one.own is None
        np.testing.assert_allclose(one.similarities, expected[order], atol=1e-5)
    assert hits[1].indices[0] == 3 and hits[1].similarities[0] == pytest.approx(1, abs=1e-5)
    with (tmp_path / "out" / "search.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["photo", "rank", "similarity", "path"] and len(rows) == 7
    assert rows[4][:2] == [str(place / "copy.png"), "1"] and rows[4][3] == "deep/3.png"
    said = capsys.readouterr().out
    assert "   1   1.000  deep/3.png\n" in said and str(tmp_path / "out" / "search.html") in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "search.csv", "search.html", "search.png", "config.json"
    }  # fmt: skip
    page = (tmp_path / "out" / "search.html").read_text()
    assert page.count("<img") == 2 * (1 + 3) and "<script" not in page
    assert np.asarray(Image.open(tmp_path / "out" / "search.png").convert("L")).std() > 10
    assert json.loads((tmp_path / "out" / "config.json").read_text())["feature"] == feature


def test_a_photo_of_the_file_is_left_out_of_its_own_results_unless_asked_for(place, tmp_path):
    (tmp_path / "link.png").symlink_to(place / "images" / "deep" / "3.png")
    for photo in (place / "images" / "deep" / "3.png", tmp_path / "link.png"):
        (found,) = search.run(config(place, photo, out=tmp_path / "out"))
        assert found.own == 3 and 3 not in found.indices and len(found.indices) == 3
        (whole,) = search.run(config(place, photo, out=tmp_path / "out", include_self=True))
        assert whole.own == 3 and whole.indices == [3, *found.indices[:2]]
    (found,) = search.run(config(place, place / "copy.png", out=tmp_path / "out", k=8))
    assert found.own is None and len(found.indices) == 8  # another file of the same pixels is shown


def test_images_that_moved_are_found_with_root_and_otherwise_have_no_thumbnails(place, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    names = embedded_images.make_images(tmp_path / "old")
    model = dinojax.load(place / "model")
    embedded_images.make_table(tmp_path / "table.npz", tmp_path / "old", names, model, place / "model")
    (tmp_path / "old").rename(tmp_path / "new")
    given = {"table": tmp_path / "table.npz", "out": tmp_path / "out"}
    search.run(config(place, place / "new.jpg", **given))
    assert f"note: {tmp_path / 'old'}, the folder of the images" in capsys.readouterr().out
    assert (tmp_path / "out" / "search.html").read_text().count("<img") == 1
    search.run(config(place, place / "new.jpg", **given, root=tmp_path / "new"))
    assert "note:" not in capsys.readouterr().out
    assert (tmp_path / "out" / "search.html").read_text().count("<img") == 4


def test_a_path_that_leads_out_of_the_folder_is_not_read(place, tmp_path):
    model = dinojax.load(place / "model")
    names, cls = ["../copy.png", str(place / "copy.png")], np.eye(2, 24, dtype=np.float32)
    embedded_images.write(tmp_path / "t.parquet", place / "images", names, np.ones((2, 2), np.int32), {"cls": cls},
                          model, place / "model")  # fmt: skip
    search.run(config(place, place / "new.jpg", table=tmp_path / "t.parquet", out=tmp_path / "out", k=2))
    assert (tmp_path / "out" / "search.html").read_text().count("<img") == 1


def test_another_model_is_refused(place, tmp_path):
    with pytest.raises(UserError, match=r"other is not the model that .*table\.parquet was made with \(fingerprint"):
        search.run(config(place, place / "new.jpg", weights=str(place / "other"), out=tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    (place / "model").rename(place / "moved")
    try:
        with pytest.raises(
            UserError, match=r"there is no such file or folder of weights .*--weights names its present"
        ):
            search.run(config(place, place / "new.jpg", out=tmp_path / "out"))
        search.run(config(place, place / "new.jpg", weights=str(place / "moved"), out=tmp_path / "out"))
    finally:
        (place / "moved").rename(place / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["TABLE"], "no photos were given; name image files or folders after the embedding file"),
        (["TABLE", "missing.jpg"], "missing.jpg: there is no such image or folder"),
        (["TABLE", "new.jpg", "--k", "9"], "--k 9 is not between 1 and the 8 images of"),
        (["TABLE", "new.jpg", "--k", "0"], "--k 0 is not a positive number"),
        (["TABLE", "new.jpg", "--feature", "dense"], "holds no column 'dense', only cls, mean_patch"),
        (["TABLE", "new.jpg", "--root", "nowhere"], "--root nowhere is not a folder"),
        (["missing.parquet", "new.jpg"], "missing.parquet: there is no such embedding file"),
        (["damaged.parquet", "new.jpg"], "damaged.parquet"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(place, tmp_path, monkeypatch, capsys, arguments, message):
    content = bytearray((place / "table.parquet").read_bytes())
    for place_in_file in range(200, len(content), 200):  # in every column
        content[place_in_file] ^= 1
    (tmp_path / "damaged.parquet").write_bytes(content)
    (tmp_path / "new.jpg").write_bytes((place / "new.jpg").read_bytes())
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    words = [str(place / "table.parquet") if word == "TABLE" else word for word in arguments]
    with pytest.raises(SystemExit) as stop:
        search.main([*words, "--out", "out", "--cache-dir", "cache"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_flag_of_self_is_self(place, tmp_path, capsys):
    photo = place / "images" / "deep" / "3.png"
    words = [str(place / "table.parquet"), str(photo), "--self", "--k", "1", "--out", str(tmp_path / "out")]
    search.main([*words, "--cache-dir", str(place / "cache")])
    assert "   1   1.000  deep/3.png   (the photo itself)" in capsys.readouterr().out
