"""Names of classes and files in figures: they are drawn letter by letter, never parsed as mathematics."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dinojax.maps import PcaMap
from experiments.figures import examples, maps, results
from experiments.figures.style import save_figure

NAME = r"$\no mathematics$"  # Matplotlib raises a ValueError where it parses this
NAMES = [NAME, "$1_bill_vs_$5_bill", "Ke$ha_$_live"]
PIXELS = np.zeros((28, 28, 3), np.uint8)
PREDICTIONS = {"labels": np.arange(3), "predicted": np.array([0, 1, 1]), "probabilities": np.full(3, 0.5)}
KEYS = ("accuracy", "balanced_accuracy", "weighted_precision", "weighted_f1")
METRICS = {"test": {**dict.fromkeys(KEYS, 0.5), "interval": dict.fromkeys(KEYS, (0.4, 0.6))}}
METRICS["train"] = METRICS["test"]
MASK, PCA = np.eye(2, dtype=bool), PcaMap(np.ones((2, 2, 3)), np.ones((2, 2), bool))
MAPS = {"title": NAME, "note": NAME}
CURVES = {"loss": np.ones(3), "accuracy": np.ones(3)}
GRID = {"chosen": (1.0, 0.5), "xlabel": NAME, "ylabel": NAME, "title": NAME}

FIGURES = {
    "curves": lambda path: examples.save_curves(path, CURVES, CURVES, best_epoch=1, heldout_name=NAME, title=NAME),
    "predictions": lambda path: examples.save_predictions(
        path, [PIXELS] * 3, class_names=NAMES, title=NAME, **PREDICTIONS
    ),
    "confusion": lambda path: results.save_confusion(path, np.eye(3, dtype=int), NAMES, title=NAME),
    "grid": lambda path: results.save_grid(path, [0.1, 1.0, 10.0], {NAME: [0.1, 0.5, 0.2]}, **GRID),
    "map": lambda path: results.save_map(path, np.eye(3, 2), np.arange(3), NAMES, axis_labels=(NAME, NAME), title=NAME),
    "classified": lambda path: results.save_classified(path, [PIXELS], [NAME], [[(NAME, NAME, 0.5)]], title=NAME),
    "bars": lambda path: results.save_bars(path, {NAME: METRICS}, {NAME: NAME}, balanced=True, title=NAME),
    "attention": lambda path: maps.save_attention(path, PIXELS, np.ones((2, 2, 2), np.float32), **MAPS),
    "masks": lambda path: maps.save_masks(path, PIXELS, {NAME: np.stack([MASK] * 2)}, **MAPS),
    "similarity": lambda path: maps.save_similarity(path, PIXELS, np.eye(2), (3, 4), **MAPS),
    "pca": lambda path: maps.save_pca(path, [PIXELS], [PCA], [NAME], **MAPS),
    "sheet": lambda path: maps.save_contact_sheet(
        path, [maps.SheetRow(PIXELS, NAME, np.eye(2), MASK, np.eye(2), PCA)] * 2, **MAPS
    ),
}


@pytest.mark.parametrize("figure", FIGURES)
def test_dollar_signs_are_no_mathematics(tmp_path, figure):
    FIGURES[figure](tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size


def test_they_are_drawn_as_they_are(tmp_path):
    """Matplotlib draws an escaped dollar sign as one."""
    for name, text in (("found", "$1_bill_vs_$5_bill"), ("expected", r"\$1_bill_vs_\$5_bill")):
        figure = Figure(figsize=(3, 1))
        figure.text(0.1, 0.5, text)
        save_figure(figure, tmp_path / name) if name == "found" else figure.savefig(tmp_path / "expected.png", dpi=150)
    found, expected = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("found", "expected"))
    np.testing.assert_array_equal(found, expected)


def test_a_logarithmic_axis_keeps_its_powers(tmp_path):
    figures = [Figure(figsize=(3, 2)) for _ in range(2)]
    for figure in figures:
        figure.subplots().set(xscale="log", xlim=(1e-6, 1))
    save_figure(figures[0], tmp_path / "found.png")
    figures[1].savefig(tmp_path / "expected.png", dpi=150)
    found, expected = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("found", "expected"))
    np.testing.assert_array_equal(found, expected)
