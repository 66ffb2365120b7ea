"""Metrics: cases counted by hand, averages equal to those of scikit-learn, intervals that cover what they should."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_score, recall_score

from experiments.data.splits import Split
from experiments.probing import metrics as metrics_module
from experiments.probing.classifier_report import table
from experiments.probing.classifiers import Prediction
from experiments.probing.metrics import compute_metrics, resample_metrics, top_accuracy, write_predictions
from experiments.probing.pipeline import Row

# By hand: class a 3 images (2 right, 1 called b), class b 2 (1 right, 1 called c), class c 1 (right); d has none.
LABELS = np.array([0, 0, 0, 1, 1, 2])
CLASSES = np.array([0, 0, 1, 1, 2, 2])
NAMES = ("a", "b", "c", "d")


def prediction(classes, num_classes, **options):
    return Prediction(classes, np.eye(num_classes)[classes], **options)


def test_a_case_counted_by_hand():
    found = compute_metrics(LABELS, prediction(CLASSES, 4), NAMES)
    assert found["accuracy"] == pytest.approx(4 / 6)
    # Precision a 2/2, b 1/2, c 1/2; recall a 2/3, b 1/2, c 1/1; F1 a 4/5, b 1/2, c 2/3.
    assert found["macro_precision"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert found["weighted_precision"] == pytest.approx((3 * 1 + 2 * 1 / 2 + 1 * 1 / 2) / 6)
    assert found["macro_recall"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert found["macro_f1"] == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
    assert found["weighted_f1"] == pytest.approx((3 * 4 / 5 + 2 * 1 / 2 + 2 / 3) / 6)
    assert found["confusion"] == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert found["per_class_accuracy"] == {"a": pytest.approx(2 / 3), "b": 0.5, "c": 1.0, "d": None}
    assert "top5_accuracy" not in found
    assert json.loads(json.dumps(found)) == found


def test_balanced_accuracy_is_scikit_learns():
    rng = np.random.default_rng(0)
    for classes in (2, 3, 7):
        labels = rng.choice(classes, 200, p=rng.dirichlet(np.ones(classes)))
        predicted = np.where(rng.random(200) < 0.6, labels, rng.choice(np.unique(labels), 200))
        found = compute_metrics(labels, prediction(predicted, classes), [str(i) for i in range(classes)])
        expected = balanced_accuracy_score(labels, predicted)
        assert (
            found["balanced_accuracy"] == pytest.approx(expected) == metrics_module.balanced_accuracy(labels, predicted)
        )
        low, high = found["interval"]["balanced_accuracy"]
        assert low < expected < high


@pytest.mark.parametrize(
    ("counts", "unlike"), [((4, 6), False), ((4, 7), True), ((5, 5, 0), False), ((2, 3, 0, 4), True)]
)
def test_classes_are_unlike_beyond_one_and_a_half_times_the_smallest(counts, unlike):
    labels = np.repeat(np.arange(len(counts)), counts)
    assert metrics_module.are_unlike(labels) == unlike


def test_every_resample_is_scored_as_scikit_learn_does(monkeypatch):
    """A draw whose counts are known: one resample of one image per cell count, compared label by label."""
    monkeypatch.setattr(metrics_module, "RESAMPLES", 7)
    monkeypatch.setattr(metrics_module, "_RESAMPLES_AT_ONCE", 3)
    rng = np.random.default_rng(0)
    confusion = rng.integers(0, 5, (4, 4)) * (rng.random((4, 4)) < 0.6)
    found = resample_metrics(confusion, np.random.default_rng(1))
    rows, columns = np.nonzero(confusion)
    again, total = np.random.default_rng(1), confusion.sum()
    share = confusion[rows, columns] / total
    for start, stop in ((0, 3), (3, 6), (6, 7)):
        for at, counts in enumerate(again.multinomial(total, share, stop - start), start):
            true, predicted = np.repeat(rows, counts), np.repeat(columns, counts)
            assert found["accuracy"][at] == pytest.approx(np.mean(true == predicted))
            recalls = [np.mean(predicted[true == one] == one) for one in np.unique(true)]
            assert found["balanced_accuracy"][at] == pytest.approx(np.mean(recalls))
            for average in ("weighted", "macro"):
                for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
                    expected = score(true, predicted, average=average, zero_division=0)
                    assert found[f"{average}_{name}"][at] == pytest.approx(expected)


def test_the_interval_is_that_of_images_drawn_with_replacement():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400)
    classes = np.where(rng.random(400) < 0.7, labels, rng.integers(0, 3, 400))
    found = compute_metrics(labels, prediction(classes, 3), ("a", "b", "c"))["interval"]
    drawn = [rng.integers(0, 400, 400) for _ in range(2000)]
    for name, score in (
        ("accuracy", lambda t, p: np.mean(t == p)),
        ("macro_f1", lambda t, p: f1_score(t, p, average="macro")),
    ):
        expected = np.percentile([score(labels[i], classes[i]) for i in drawn], (2.5, 97.5))
        # Two bootstraps of 400 images, each image 0.0025: 0.005 measured.
        np.testing.assert_allclose(found[name], expected, atol=0.01)


def test_intervals_follow_the_seed_alone():
    one, again, other = (
        compute_metrics(LABELS, prediction(CLASSES, 4), NAMES, seed=seed)["interval"] for seed in (1, 1, 2)
    )
    assert one == again != other


def test_top_five_is_counted_by_rank_and_only_where_there_are_more_classes():
    scores = np.tile(np.arange(7.0)[::-1], (3, 1))  # class 0 first, class 6 last
    assert top_accuracy(np.array([4, 5, 0]), scores) == pytest.approx(2 / 3)
    assert top_accuracy(np.array([4, 5]), np.zeros((2, 7))) == 0.5  # ties to the lower index
    found = compute_metrics(np.array([4, 5, 0]), Prediction(np.zeros(3, int), scores), [str(i) for i in range(7)])
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["top5_accuracy"] == pytest.approx(2 / 3)
    low, high = found["interval"]["top5_accuracy"]
    assert 0 <= low < 2 / 3 < high <= 1


def test_every_prediction_is_written_by_name(tmp_path):
    splits = [
        Split("train", ["train/a/1, old.png", "2"], np.array([0, 1]), lambda i: None, ""),
        Split("test", ["3"], np.array([1]), lambda i: None, ""),
    ]
    given = [
        Prediction(np.array([0, 0]), np.array([[0.75, 0.25], [0.5, 0.5]])),
        Prediction(np.array([1]), np.array([[0.1, 0.9]])),
    ]
    write_predictions(tmp_path / "p.csv", list(zip(splits, given)), ("a", "b"))
    with (tmp_path / "p.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["split", "id", "true", "predicted", "probability"],
            ["train", "train/a/1, old.png", "a", "a", "0.750000"],
            ["train", "2", "b", "a", "0.500000"],
            ["test", "3", "b", "b", "0.900000"],
        ]


def test_the_table_says_which_average_its_f1_is():
    """The case counted by hand: 0.689 weighted by images, 0.656 over the three classes."""
    found = compute_metrics(LABELS, prediction(CLASSES, 4), NAMES) | {"interval": {"accuracy": [0.5, 0.8]}}
    one = {"title": "one", "test": found, "train": found, "train_test_gap": 0.0, "selection": "", "settings": {"k": 1}}
    cost = {"fit": {"seconds": 1.0, "peak_mib": None}, "predict": {"seconds": 1.0, "peak_mib": None}}
    metrics = {"classifiers": {"one": one | {"fit": {}}}, "cost": {"one": cost}, "features_seconds": 1.0}
    header, row, _ = table(metrics, []).splitlines()
    end = header.index("weighted F1 %") + len("weighted F1 %")
    assert row[end - 5 : end] == f"{100 * found['weighted_f1']:.2f}" == "67.78"
    assert f"{100 * found['macro_f1']:.2f}" != "67.78"


def test_the_table_shows_balanced_accuracy_beside_accuracy_and_the_name_of_the_images():
    """The case counted by hand: recalls of 2/3, 1/2 and 1."""
    found = compute_metrics(LABELS, prediction(CLASSES, 4), NAMES)
    one = {"title": "one", "test": found, "train": found, "train_test_gap": 0.0, "selection": "", "settings": {"k": 1}}
    cost = {"fit": {"seconds": 1.0, "peak_mib": None}, "predict": {"seconds": 1.0, "peak_mib": None}}
    metrics = {"classifiers": {"one": one | {"fit": {}}}, "cost": {"one": cost}, "features_seconds": 1.0}
    row = Row("model", "cls", "5_shot_knn", (0.25, 0.75), (0.5, 0.7))
    header, line, few, features = table(metrics, [row], "validation", balanced=True).splitlines()
    for name, shown in (("validation %", "66.67"), ("balanced %", "72.22"), ("weighted F1 %", "67.78")):
        end = header.index(name) + len(name)
        assert line[end - 5 : end] == shown
    end = header.index("balanced %") + len("balanced %")
    assert few[end - 5 : end] == "60.00" and few.index("mean and") == header.index("selection")
    assert len(features) == header.index("fit s") + len("fit s")
