"""Clusters of known groups; the same seed gives the same labels; mistakes are one sentence."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_score

from dinojax import UserError
from experiments import cluster
from experiments.cluster import Config
from experiments.gallery import clustering
from experiments.gallery.clustering import find_clusters
from experiments.runs.settings import create
from tests.support import embedded_images


def groups(sizes, dim=24, noise=0.05, seed=0):
    """Unit vectors around distant directions, shuffled, and the group of each."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    points = np.eye(len(sizes), dim)[labels] + noise * rng.standard_normal((len(labels), dim))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("method", ["kmeans", "agglomerative"])
@pytest.mark.parametrize("k", [4, None])
def test_distant_groups_are_found_and_numbered_by_size(method, k, monkeypatch):
    monkeypatch.setattr(clustering, "SAMPLE", 60)
    unit, labels = groups((10, 40, 20, 30))
    found = find_clusters(unit, k, most=7, method=method, seed=0)
    assert adjusted_rand_score(labels, found.labels) == 1
    assert found.sizes.tolist() == [40, 30, 20, 10]
    for number in range(4):
        members = unit[found.labels == number].astype(np.float64)
        centre = members.mean(axis=0) / np.linalg.norm(members.mean(axis=0))
        np.testing.assert_allclose(found.similarity[found.labels == number], members @ centre, atol=1e-5)
        typical = found.members(number)
        assert found.similarity[typical[0]] == found.similarity[found.labels == number].max()
    if k is None:
        assert list(found.silhouettes) == [2, 3, 4, 5, 6, 7] and max(found.silhouettes, key=found.silhouettes.get) == 4


def test_the_silhouettes_are_scikit_learns():
    unit, _ = groups((15, 15, 15), noise=0.4)
    found = find_clusters(unit, None, most=5, method="agglomerative", seed=0)
    fixed = {k: find_clusters(unit, k, most=2, method="agglomerative", seed=0).labels for k in found.silhouettes}
    for k, labels in fixed.items():
        assert found.silhouettes[k] == pytest.approx(silhouette_score(unit, labels, metric="cosine"), abs=1e-6)


def test_the_seed_decides():
    unit, _ = groups((100,), noise=1.0)  # no structure: starts matter
    runs = [find_clusters(unit, 7, most=2, method="kmeans", seed=seed).labels for seed in (3, 3, 4)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A file of twelve images in three groups, of which eight are on disk, and one of images that are all the same."""
    place = tmp_path_factory.mktemp("cluster")
    names = embedded_images.make_images(place / "images") + [f"gone/{i}.png" for i in range(4)]
    model = embedded_images.make_model(place / "model")
    unit, _ = groups((6, 4, 2))
    for name, cls in (("table", unit), ("same", np.ones((12, 24), np.float32))):
        embedded_images.write(place / f"{name}.parquet", place / "images", names, np.ones((12, 2), np.int32),
                              {"cls": cls}, model, place / "model")  # fmt: skip
    return place


def test_files_hold_the_clusters(place, tmp_path, capsys):
    found = cluster.run(create(Config, table=place / "table.parquet", out=tmp_path / "out", k_max=5))
    assert found.sizes.tolist() == [6, 4, 2]
    with (tmp_path / "out" / "clusters.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["cluster"]) for row in rows] == found.labels.tolist()
    assert rows[0]["path"] == "deep/0.png"
    numbers = json.loads((tmp_path / "out" / "clusters.json").read_text())
    assert numbers["clusters"] == 3 and numbers["sizes"] == [6, 4, 2] and set(numbers["silhouette_by_k"]) == set("2345")
    sheets = {f"cluster_0{i}.png" for i in range(3)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == sheets | {
        "clusters.csv", "clusters.html", "clusters.png", "clusters.json", "config.json"}  # fmt: skip
    page = (tmp_path / "out" / "clusters.html").read_text()
    assert page.count("<li") == 12 and page.count("<img") == 8 and "<script" not in page
    assert "12 images in 3 clusters (silhouette 0." in page
    assert "3       0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        ("table", ["--k", "1"], "--k 1 is not auto, or 2 or more"),
        ("table", ["--k", "13"], "--k 13 is not at most the 12 images of"),
        ("table", ["--k-max", "1"], "--k-max 1 is not 2 or more"),
        ("same", ["--k", "3"], "--k 3 is more than the 1 images that differ"),
        ("same", [], "--k auto needs three images or more, two of which differ"),
        ("gone", [], "gone.parquet: there is no such embedding file"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(place, tmp_path, monkeypatch, capsys, table, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cluster.main([str(place / f"{table}.parquet"), *arguments, "--out", "out"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and sum(line.startswith("error") for line in lines) == 1
    assert not list(tmp_path.iterdir())


def test_all_pairs_of_too_many_images_are_refused(monkeypatch):
    monkeypatch.setattr(clustering, "MOST_AGGLOMERATIVE", 9)
    with pytest.raises(UserError, match="--method agglomerative compares all pairs of 10 images"):
        find_clusters(groups((5, 5))[0], 2, most=2, method="agglomerative", seed=0)
