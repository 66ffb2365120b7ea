"""Means, deviations and intervals are scipy's and the textbooks'; what differs in more than a seed stays apart."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import summarize
from experiments.summaries.evaluations import cell, difference, group, transfer
from experiments.summaries.results import EvaluatedRun, read_runs

ARCHITECTURE = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 12, "num_heads": 3}
KEY = ("teacher", "cls", "knn_20")
HERE = Path()


def document(seed=0, accuracy=0.5, *, data="cifar100", on="cifar100", command="evaluate", weights=None, **changes):
    """What `evaluate` writes, as far as it matters here."""
    training = {"seed": seed, "epochs": 200, "patch_size": 4, "out": f"run{seed}", "data": data, "learning_rate": 1e-4}
    config = {"seed": 0, "out": f"eval{seed}", "weights": f"run{seed}", "epochs": 100, "max_train": None, **changes}
    row = {"network": "teacher", "features": "cls", "probe": "knn_20", "accuracy": accuracy, "interval": [0.4, 0.6]}
    return {
        "command": command, "weights": f"run{seed}", "image_size": 32, "resize": 32,
        "feature_dtype": "float32", "parameters": 5_400_000,
        "data": {"name": on, "train_images": 50_000, "test_images": 10_000, "folds": 1, "train_fingerprint": "x"},
        "networks": {"teacher": {"fingerprint": weights or f"w{data}{seed}", "architecture": ARCHITECTURE}},
        "pretraining": {"data": data, "images": 50_000, "epochs": 200, "seed": seed, "config": training,
                        "train_seconds": 3600.0 * (seed + 1), "backend": "cuda"},
        "rows": [row, {**row, "features": "chosen", "probe": "sweep", "accuracy": accuracy + 0.1}],
        "config": config,
    }  # fmt: skip


def write(root, documents):
    for number, one in enumerate(documents):
        folder = root / f"{number}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(one))
        (folder / "config.json").write_text("{}")
    return root


def test_seeds_are_one_line_with_mean_and_deviation(tmp_path):
    accuracies = [0.50, 0.54, 0.585]
    write(tmp_path / "runs", [document(seed, accuracy) for seed, accuracy in enumerate(accuracies)])
    text = summarize.run(summarize.Config((tmp_path / "runs",), out=tmp_path / "results.md")).text
    assert (tmp_path / "results.md").read_text() == text + "\n"
    (line,) = (line for line in text.splitlines() if line.startswith("| ViT-Tiny/4"))
    deviation = 100 * stats.tstd(accuracies)
    words = [word.strip() for word in line.strip("|").split("|")]
    assert words == [
        "ViT-Tiny/4", "cifar100", "50,000", "5.4 M", "200", "2 GPU h", "cifar100, 32 px",
        f"54.17 ± {deviation:.2f} (3)", f"64.17 ± {deviation:.2f} (3)", "–",
    ]  # fmt: skip
    assert "### ViT-Tiny/4 trained on cifar100: cifar100, 32 px (n = 3)" in text
    for words in ("| DINO ViT-S/16 ", " 74.5 ", " 77.0 ", " 75.3 ", " 78.2 ", "1,281,167", "arXiv 2104.14294"):
        assert words in text
    assert "Does CIFAR-100 transfer" not in text


def test_tables_are_markdown_whose_lines_have_the_same_columns(tmp_path, capsys):
    write(tmp_path, [document(0), document(1, data="cifar10")])
    summarize.main([str(tmp_path)])
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({len(line.split("|")) for line in tables[:8]}) == 1
    assert set(tables[1]) == {"|", " ", "-"}


@pytest.mark.parametrize(
    "other",
    [
        {"epochs": 50},
        {"on": "cifar10"},
        {"data": "cifar10"},
        {"max_train": 1000},
        {"command": "stl10_transfer"},
    ],
)
def test_other_settings_are_other_lines(tmp_path, other):
    runs = read_runs([write(tmp_path, [document(0), document(1, **other)])])
    assert [len(one.runs) for one in group(runs)] == [1, 1]


def test_what_changes_no_number_is_the_same_line(tmp_path):
    others = {"out": "elsewhere", "batch_size": 7, "cache_dir": "there", "figures": False, "classifiers": "knn"}
    (one,) = group(read_runs([write(tmp_path, [document(0), document(1, 0.6, **others)])]))
    np.testing.assert_allclose(one.values[KEY], [0.5, 0.6])


def test_the_same_weights_count_once(tmp_path):
    documents = [document(0, 0.5), document(0, 0.6), document(1, 0.7)]
    documents[1]["config"]["seed"] = 1  # evaluated with another seed
    (one,) = group(read_runs([write(tmp_path, documents)]))
    np.testing.assert_allclose(one.values[KEY], [0.55, 0.7])
    assert cell(one.values[KEY]) == f"62.50 ± {100 * stats.tstd([0.55, 0.7]):.2f} (2)"


def test_numbers_selected_on_the_test_set_are_marked_under_the_old_and_the_new_name_of_the_protocol(tmp_path):
    documents = [document(seed, 0.5 + seed / 10, protocol=name) for seed, name in enumerate(("seed", "reported"))]
    honest = document(2, 0.7, protocol="heldout")
    groups = group(read_runs([write(tmp_path, [*documents, honest])]))
    assert [len(one.runs) for one in groups] == [2, 1]
    labels = [one.first.evaluated_on for one in groups]
    assert labels == ["cifar100, 32 px, selected on the test set", "cifar100, 32 px"]


def test_published_weights_are_named(tmp_path):
    one = document(0)
    one["pretraining"], one["weights"] = {}, "dinov2_vits14"
    text = summarize.run(summarize.Config((write(tmp_path, [one]),))).text
    assert "| dinov2_vits14 " in text and "### dinov2_vits14: cifar100, 32 px (n = 1)" in text


def side(accuracies, trained_on, *, images=1000):
    def interval(p):
        return tuple(stats.binomtest(round(p * images), images).proportion_ci(method="wilson"))

    return [
        EvaluatedRun(
            HERE, trained_on, f"{trained_on}{i}", trained_on, "stl10, 96 px", {}, None, "", {KEY: p}, {KEY: interval(p)}
        )
        for i, p in enumerate(accuracies)
    ]


def test_the_claim_is_tested_over_seeds_by_welch():
    x, y = [0.62, 0.64, 0.63], [0.53, 0.55, 0.50]
    groups = group(side(x, "cifar100") + side(y, "tiny_imagenet"))
    low, high, over = difference(*groups, KEY)
    a, b = np.var(x, ddof=1) / 3, np.var(y, ddof=1) / 3
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 2)  # Welch–Satterthwaite
    half = stats.t.ppf(0.975, freedom) * np.sqrt(a + b)
    middle = np.mean(x) - np.mean(y)
    assert (low, high) == pytest.approx((middle - half, middle + half)) and over == "seeds"
    text = transfer(groups)
    assert f"| {100 * middle:+.2f} " in text and f"{100 * low:+.2f} to {100 * high:+.2f}" in text
    assert text.rstrip().splitlines()[4].endswith("| seeds | CIFAR-100 |")


@pytest.mark.parametrize(
    ("x", "y", "verdict"), [(0.634, 0.532, "CIFAR-100"), (0.5, 0.6, "Tiny-ImageNet"), (0.55, 0.54, "undecided")]
)
def test_single_seeds_are_compared_over_test_images(x, y, verdict):
    groups = group(side([x], "cifar100") + side([y], "tiny-imagenet-200"))
    low, high, over = difference(*groups, KEY)
    assert over == "test images" and low < x - y < high
    (line,) = (line for line in transfer(groups).splitlines() if line.startswith("| k-NN"))
    assert line.rstrip(" |").endswith(verdict)


def test_the_interval_of_two_proportions_is_newcombes():
    """The example of Newcombe (1998), Table II, case (a), method 10: 56/70 and 48/80 give 0.0524 to 0.3339."""

    def one(hits, images):
        interval = tuple(stats.binomtest(hits, images).proportion_ci(method="wilson"))
        return EvaluatedRun(HERE, str(images), "w", "", "stl10", {}, None, "", {KEY: hits / images}, {KEY: interval})

    low, high, _ = difference(*group([one(56, 70), one(48, 80)]), KEY)
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)


def tuned(root, mode, seed, accuracy, *, split="validation", **changes):
    """What `finetune_folder` leaves of one mode, as far as it matters here."""
    folder = root / f"{mode}-{seed}-{len(list(root.glob('*')))}" / mode
    folder.mkdir(parents=True)
    config = {"mode": mode, "seed": seed, "out": str(folder), "balance": "none", "epochs": 6, **changes}
    metrics = {
        "mode": mode, "weights": "dinojax_vitt", "image_size": 48, "trainable_parameters": 1234,
        "data": {"name": "cotton", "train_images": 90, "validation_images": 30, "test_images": 20},
        "seconds_an_epoch": {"median": 2.0 + seed}, "validation": {"accuracy": 0.1, "balanced_accuracy": 0.1},
    }  # fmt: skip
    metrics[split] = {"accuracy": accuracy, "balanced_accuracy": accuracy - 0.2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder.parent / "metrics.json").write_text(json.dumps({mode: metrics}))


def test_seeds_of_a_fine_tuning_are_one_line_and_other_settings_another(tmp_path):
    accuracies = [0.70, 0.72, 0.77]
    for seed, accuracy in enumerate(accuracies):
        tuned(tmp_path, "lora", seed, accuracy)
    tuned(tmp_path, "lora", 0, 0.6, balance="loss")
    tuned(tmp_path, "linear", 0, 0.5, split="test")
    text = summarize.run(summarize.Config((tmp_path,))).text
    assert "### cotton from dinojax_vitt, 48 px" in text and "Overview" not in text
    lines = [[word.strip() for word in line.strip("|").split("|")] for line in text.splitlines() if "1,234" in line]
    deviation = f"{100 * stats.tstd(accuracies):.2f} (3)"
    assert lines == [
        ["linear", "20 test", "50.00 (1)", "30.00 (1)", "1,234", "2.0"],
        ["lora, balance none", "30 validation", f"73.00 ± {deviation}", f"53.00 ± {deviation}", "1,234", "3.0"],
        ["lora, balance loss", "30 validation", "60.00 (1)", "40.00 (1)", "1,234", "2.0"],
    ]


def test_fine_tunings_beside_evaluations(tmp_path):
    write(tmp_path / "evaluations", [document()])
    tuned(tmp_path, "llrd", 0, 0.7)
    text = summarize.run(summarize.Config((tmp_path,))).text
    assert "## Overview" in text and "| llrd " in text


def test_folders_without_runs_and_damaged_files_are_one_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    (tmp_path / "old").mkdir()
    for name in ("config.json", "metrics.json", "classifiers.json"):
        (tmp_path / "old" / name).write_text("{}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "result.json").write_text('{"rows": [')
    for arguments, message in (
        ([], "no runs were given"),
        (["missing"], "missing: there is no such folder"),
        ([str(tmp_path / "empty")], "empty holds no result.json of a run"),
        ([str(tmp_path / "old")], "old is of an earlier version of cifar10_probe, which wrote no result.json"),
        (
            [str(tmp_path / "unfinished")],
            "unfinished is a pretraining that has not ended and holds no results; repeat its command",
        ),
        ([str(tmp_path / "damaged")], "result.json is missing or damaged"),
    ):
        with pytest.raises(SystemExit) as stop:
            summarize.main(arguments)
        assert stop.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0], lines
