"""Labels, legends and titles that fit their figure, whatever the number and the names of the classes."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.data.splits import Split
from experiments.figures import examples, maps, results
from experiments.figures.style import shorten_middle
from experiments.probing.pipeline import Row
from experiments.probing.report import save_accuracies

LONG = "a_class_whose_name_is_much_longer_than_any_figure_is_wide"
TITLE = f"{LONG} of {LONG}, and {LONG}\n{LONG}/{LONG}"
KEYS = ("accuracy", "balanced_accuracy", "weighted_precision", "weighted_f1")


@pytest.fixture
def drawn(monkeypatch):
    """Figures, kept instead of written."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    return figures


def names(classes):
    return [f"{LONG}_{i}" for i in range(classes)]


def assert_everything_fits(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    axes_and_labels = [axes.get_tightbbox(canvas.get_renderer()) for axes in figure.axes]
    inside = figure.bbox.padded(1)
    for box in (*boxes, *filter(None, axes_and_labels)):
        assert inside.contains(*box.min) and inside.contains(*box.max)
    for box, legend in itertools.product(filter(None, axes_and_labels), figure.legends):
        assert not box.overlaps(legend.get_window_extent())
    for axes in figure.axes:
        labels = [label for label in axes.get_xticklabels() if label.get_text() and not label.get_rotation()]
        extents = [label.get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(extents))


def numbers(value):
    return {**dict.fromkeys(KEYS, value), "interval": dict.fromkeys(KEYS, (value, value))}


def test_numbered_files_stay_apart():
    names = [f"a_photo_of_a_leaf_{i:04}.jpg" for i in range(3)]
    shown = [shorten_middle(name, 16) for name in names]
    assert shown == ["a_photo_…000.jpg", "a_photo_…001.jpg", "a_photo_…002.jpg"]
    assert shorten_middle("short.jpg", 9) == "short.jpg"
    assert all(len(shorten_middle(names[0], letters)) == letters for letters in range(3, 20))


def test_small_shares_and_small_attention_are_short():
    mask = np.zeros((20, 20), bool)
    assert maps._share(mask) == "0 %"
    mask[0, 0] = True
    assert maps._share(mask) == "< 1 %"
    assert maps._percent_range(0.00012, 0.0015) == "0.012–0.15 %"
    assert maps._percent_range(1.9e-7, 0.0043) == "0–0.43 %"


@pytest.mark.parametrize("classifiers", [1, 8])
def test_bars(drawn, tmp_path, classifiers):
    metrics = {f"one {i}": {"test": numbers(0.3), "train": numbers(1.0)} for i in range(classifiers)}
    titles = dict.fromkeys(metrics, "logistic regression")
    results.save_bars(tmp_path, metrics, titles, evaluated="validation", balanced=True, title=TITLE)
    assert_everything_fits(*drawn)


@pytest.mark.parametrize("classes", [1, 2, 12, 30, 100])
def test_confusion_and_map(drawn, tmp_path, classes):
    results.save_confusion(tmp_path, np.eye(classes, dtype=int), names(classes), title=TITLE)
    points = np.random.default_rng(0).random((2 * classes, 2))
    labels = np.tile(np.arange(classes), 2)
    results.save_map(tmp_path, points, labels, names(classes), axis_labels=("x", "y"), title=TITLE)
    for figure in drawn:
        assert_everything_fits(figure)


def test_curves_grids_and_predictions(drawn, tmp_path):
    curves = {"loss": np.ones(3), "accuracy": np.array([0.0, 0.0, 1.0])}
    examples.save_curves(tmp_path, curves, curves, best_epoch=1, heldout_name="held-out training images", title=TITLE)
    lines = {f"CLS of {i} blocks and mean patch": [0.0, 0.5, 1.0] for i in range(4)}
    results.save_grid(tmp_path, [0.1, 1, 10], lines, (1, 0.5), xlabel="C", ylabel="accuracy (%)", title=TITLE)
    given = [("logistic regression", LONG, 0.5), ("SVC, RBF", LONG, float("nan"))]
    pixels = np.zeros((20, 40, 3), np.uint8)
    results.save_classified(tmp_path, [pixels] * 3, [LONG] * 3, [given] * 3, title=TITLE)
    examples.save_predictions(
        tmp_path, [pixels] * 3, np.arange(3), np.array([0, 1, 1]), np.full(3, 0.5), names(3), title=TITLE
    )
    for figure in drawn:
        assert_everything_fits(figure)
    shares = [axes for axes in drawn[0].axes + drawn[1].axes if "accuracy" in axes.get_ylabel()]
    assert len(shares) == 2
    assert all(axes.get_ylim()[0] >= 0 and axes.get_ylim()[1] <= 100 for axes in shares)


@pytest.mark.parametrize("unlike", [False, True])
def test_accuracies_show_no_share_below_zero_and_balanced_ones_where_classes_are_unlike(drawn, tmp_path, unlike):
    labels = np.repeat([0, 1], [9, 2] if unlike else [6, 5])
    split = Split("validation", [str(i) for i in range(11)], labels, lambda i: None, "")
    rows = [
        Row("teacher", "cls", "5_shot_knn", (0.0, 0.1, 0.0), (0.0, 0.2, 0.0)),
        Row("teacher", "mean_patch", "knn5", (0.0,), (0.0,), (0.0, 0.2)),
        Row("untrained", "chosen", "sweep", (1.0,), (1.0,), (0.8, 1.0)),
    ]
    save_accuracies(tmp_path, rows, split, title=TITLE)
    (figure,) = drawn
    assert_everything_fits(figure)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "accuracy on the validation images (%)", "balanced accuracy (%)"
    ][: 1 + unlike]  # fmt: skip
    for axes in figure.axes:
        ends = np.concatenate([segment[:, 0] for bars in axes.collections for segment in bars.get_segments()])
        assert ends.min() >= 0 and ends.max() <= 100
        assert axes.get_xlim()[0] >= 0 and axes.get_xlim()[1] <= 100
