"""Planted copies come back as groups; the CSV, the page and the sheet say the same; mistakes are one sentence."""

import csv

import numpy as np
import pytest

import dinojax
from experiments import duplicates
from experiments.duplicates import Config
from experiments.runs.settings import create
from tests.support import embedded_images
from tests.support.embedded_images import HOSTILE, picture


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Eight images; image 2 also at twice the size and as a JPEG, image 5 also under another name."""
    place = tmp_path_factory.mktemp("duplicates")
    names = embedded_images.make_images(place / "images")
    copies = {"big.png": picture(2, 40, 48), "a.jpg": picture(2), "b.png": picture(5)}
    for name, image in copies.items():
        image.save(place / "images" / name, quality=95)
    model = embedded_images.make_model(place / "model")
    embedded_images.make_table(place / "table.parquet", place / "images", [*names, *copies], model, place / "model")
    return place


def config(place, **changes):
    return create(Config, **({"table": place / "table.parquet", "out": place / "out", "threshold": 0.9998} | changes))


def test_planted_copies_are_groups_and_the_largest_image_is_kept(place, tmp_path, capsys):
    groups = duplicates.run(config(place, out=tmp_path / "out"))
    assert [set(group.images) for group in groups] == [{2, 8, 9}, {5, 10}]
    assert groups[0].images[0] == 8  # twice the size
    assert groups[1].images == [5, 10]  # the first of equals
    files = [place / "images" / name for name in ("big.png", "deep/2.png", "a.jpg")]
    model = dinojax.load(place / "model")
    cls = dinojax.embed(model, dinojax.preprocess(files, model, size=16)).cls.astype(np.float64)
    cls /= np.linalg.norm(cls, axis=1, keepdims=True)
    expected = dict(zip((8, 2, 9), cls @ cls[0]))
    for image, similarity in zip(groups[0].images, groups[0].to_kept):
        assert similarity == pytest.approx(expected[image], abs=1e-5)
    assert groups[0].to_kept == sorted(groups[0].to_kept, reverse=True)
    with (tmp_path / "out" / "duplicates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["keep"] for row in rows] == ["yes", "no", "no", "yes", "no"]
    assert (rows[0]["path"], rows[0]["width"], rows[0]["height"]) == ("big.png", "48", "40")
    assert min(float(row["similarity_to_nearest"]) for row in rows) >= 0.9998
    summary = "11 images; 2 groups of 5 images at a similarity of 0.9998 or more, of which 3 repeat another."
    assert summary in capsys.readouterr().out
    page = (tmp_path / "out" / "duplicates.html").read_text()
    assert summary in page and page.count("<img") == 5 and page.count("class=marked") == 2
    assert (tmp_path / "out" / "duplicates.png").stat().st_size > 10_000


def test_one_group_of_all_images_and_none_at_all(place, tmp_path):
    model = dinojax.load(place / "model")
    names = [HOSTILE, *(f"{i}.png" for i in range(69))]
    sizes = np.ones((70, 2), np.int32)
    for cls, count in ((np.ones((70, 24), np.float32), 1), (np.eye(70, dtype=np.float32), 0)):
        path = tmp_path / f"{count}.parquet"
        embedded_images.write(path, place / "images", names, sizes, {"cls": cls}, model, place / "model")
        groups = duplicates.run(config(place, table=path, out=tmp_path / str(count), threshold=1.0))
        assert [group.images for group in groups] == [list(range(70))] * count
        page = (tmp_path / str(count) / "duplicates.html").read_text()
        assert "<script" not in page and page.count("<li") == count * 48
        assert (tmp_path / str(count) / "duplicates.png").exists() == bool(count)
    assert (tmp_path / "0" / "duplicates.csv").read_text().splitlines() == [
        "group,path,keep,width,height,similarity_to_kept,similarity_to_nearest"
    ]


def test_whitened_features_tell_apart_what_shares_a_strong_direction(place, tmp_path):
    """All images point nearly one way; two of them are also alike in the rest."""
    model = dinojax.load(place / "model")
    cls = 0.05 * np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    cls[41] = cls[7] + 0.002
    cls[:, 0] += 1
    names, sizes = [f"{i}.png" for i in range(60)], np.ones((60, 2), np.int32)
    embedded_images.write(tmp_path / "t.npz", place / "images", names, sizes, {"cls": cls}, model, place / "model")
    given = {"table": tmp_path / "t.npz", "threshold": 0.96}
    plain, whitened = (
        duplicates.run(config(place, **given, whiten=whiten, out=tmp_path / str(whiten))) for whiten in (False, True)
    )
    assert len(plain[0].images) > 10
    assert [group.images for group in whitened] == [[7, 41]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "0"], "--threshold 0.0 is not above 0 and up to 1"),
        (["--threshold", "1.5"], "--threshold 1.5 is not above 0 and up to 1"),
        (["--threshold", "nan"], "--threshold nan is not above 0 and up to 1"),
        (["--whiten"], "--whiten needs 48 images or more, and"),
        (["--feature", "gem"], "holds no column 'gem'"),
        (["--out", "file"], "--out file is a file"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(place, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        duplicates.main([str(place / "table.parquet"), "--out", "out", *arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
