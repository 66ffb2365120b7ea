"""The figure of a pretraining: what it has panels for, and where its axes start."""

import pytest

from experiments.pretraining.curves import draw_training_curves

CONSTANT = {"weight_decay": 0.04, "teacher_temp": 0.04}


def step(number, **changes):
    values = {"loss": 6 - number / 10, "teacher_entropy": 5.0, "kl": 1 - number / 10, "gradient_norm": 1e-3 * number}
    values |= {"clipped_share": 0.0, "feature_std": 0.01 * number, "center_norm": 1.0, "learning_rate": 1e-5 * number}
    values |= {"weight_decay": 0.04 + number / 100, "teacher_momentum": 0.99 + number / 1e4, "teacher_temp": 0.04}
    return {"step": number, "epoch": number / 2, **values, **changes}


def drawn(records):
    """The figure, and the labels of its axes."""
    figure = draw_training_curves(records, 16, title="a title")
    return figure, [axes.get_ylabel() for axes in figure.axes]


def test_constant_schedules_have_no_panel_and_are_named():
    figure, labels = drawn([step(i, **CONSTANT) for i in range(1, 5)])
    assert {"learning rate", "teacher momentum"} < set(labels)
    assert not {"weight decay", "teacher temp"} & set(labels)
    assert "constant: weight decay 0.04, teacher temp 0.04" in figure.get_suptitle()
    constant = {**CONSTANT, "learning_rate": 1e-3, "teacher_momentum": 0.99}
    _, labels = drawn([step(i, **constant) for i in range(1, 5)])
    assert labels.count("nats") == 1 and len(labels) == 5  # loss, and two pairs of the training's health


def test_no_axis_of_a_quantity_that_is_not_negative_starts_below_zero():
    records = [step(i) for i in range(1, 5)] + [{"step": 4, "epoch": 2, "knn_accuracy": 0.0, "rank_me": 1.0}]
    figure, labels = drawn(records)
    lowest = {label: axes.get_ylim()[0] for label, axes in zip(labels, figure.axes) if label != "nats"}
    assert lowest["clipped share"] == 0 and lowest["k-NN on training images (%)"] == 0
    assert min(lowest.values()) == 0


@pytest.mark.parametrize("labelled", [True, False])
def test_the_monitors_are_drawn_as_far_as_they_were_measured(labelled):
    measured = {"rank_me": 3.0} | ({"knn_accuracy": 0.5} if labelled else {})
    records = [{"step": 0, "epoch": 0, **measured}, *(step(i) for i in range(1, 5))]
    _, labels = drawn(records)
    assert "feature rank (RankMe)" in labels
    assert ("k-NN on training images (%)" in labels) is labelled
