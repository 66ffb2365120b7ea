"""The report of an evaluation: the table of all probes and networks, and its figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.splits import Split
from experiments.features.parts import CLS, MEAN_PATCH, PIXELS
from experiments.probing.classifiers import TITLES
from experiments.probing.metrics import UNLIKE, are_unlike, class_sizes
from experiments.probing.networks import UNTRAINED
from experiments.probing.pipeline import CHOSEN, Row

FEATURE_TITLES = {CLS: "CLS", MEAN_PATCH: "mean patch", PIXELS: "raw", CHOSEN: "chosen"}
_WIDTH = 15
_FEW_SHOT = {"1nn": "1-NN", "knn": "k-NN", "linear": "linear"}
_ORDER = ("knn_", "knn5", "linear", "sweep", "logistic", "mlp", "svc", "")
_PROBES = TITLES | {
    "knn5": "k-NN, Euclidean, k = 5",
    "knn5_crops": "k-NN, Euclidean, k = 5, crops",
    "linear_crops": "linear, Adam, crops",
}


def in_order(probes: Iterable[str]) -> list[str]:
    """Probes in the order of tables and figures, each once: neighbours, linear ones, others, few-shot."""
    return sorted(dict.fromkeys(probes), key=lambda probe: next(i for i, x in enumerate(_ORDER) if probe.startswith(x)))


def probe_title(probe: str) -> str:
    """A probe's name as tables and figures show it."""
    shots, few_shot, method = probe.partition("_shot_")
    if few_shot:
        return f"{shots}-shot {_FEW_SHOT[method]}"
    if probe.startswith("knn_"):
        return f"k-NN, weighted cosine, k = {probe.removeprefix('knn_')}"
    return _PROBES[probe]


def table(rows: Sequence[Row], evaluated: Split, folds: int) -> str:
    """Per cent: one line for each probe, one column for each network and part of the features.

    The same lines follow for balanced accuracy where classes are unlike.
    """
    lines = _lines(rows)
    if are_unlike(evaluated.labels):
        lines += ["", "balanced accuracy (the mean over the classes)", *_lines([row.balanced for row in rows])[2:]]
    lines += ["", *(_choice(row) for row in rows if row.probe == "sweep"), _explanation(rows, evaluated, folds)]
    return "\n".join(lines)


def _lines(rows: Sequence[Row]) -> list[str]:
    cells = {(row.network, CLS if row.features == CHOSEN else row.features, row.probe): row for row in rows}
    columns = list(dict.fromkeys(place[:2] for place in cells))
    lines = [
        " " * 31 + "".join(f"{network:>{_WIDTH}}" for network, _ in columns),
        " " * 31 + "".join(f"{FEATURE_TITLES[features]:>{_WIDTH}}" for _, features in columns),
    ]
    for probe in in_order(row.probe for row in rows):
        found = [cells.get((*column, probe)) for column in columns]
        shown = "".join(f"{cell(row) if row else '':>{_WIDTH}}" for row in found)
        lines.append(f"{probe_title(probe):31}{shown}".rstrip())
    return lines


def cell(row: Row) -> str:
    """Per cent, with the deviation where there is one."""
    shown = f"{100 * row.accuracy:.2f}"
    return shown if row.deviation is None else f"{shown} ± {100 * row.deviation:.2f}"


def _choice(row: Row) -> str:
    best, several = row.details["best"], ", first fold" if len(row.accuracies) > 1 else ""
    blocks = "CLS" if best["blocks"] == 1 else f"CLS of {best['blocks']} blocks"
    features = blocks + (" and mean patch" if best["mean_patch"] else "")
    rate = f"learning rate {best['learning_rate']:g}"
    return f"52 heads, {row.network}{several}: {features}, {rate}, {row.details['selection']}"


def _explanation(rows: Sequence[Row], evaluated: Split, folds: int) -> str:
    halves = [100 * (row.interval[1] - row.interval[0]) / 2 for row in rows if row.interval]
    words = [f"Per cent of the {len(evaluated):,} {evaluated.name} images that are classified correctly"]
    if halves:
        words.append(f"95 % intervals over them are ± {max(halves):.1f} or less")
    deviations = ["folds"] * (folds > 1) + ["draws of few-shot"] * any("_shot_" in r.probe for r in rows)
    if deviations:
        words.append(f"± in the table is the deviation over {' and '.join(deviations)}")
    return "; ".join(words) + "." + unlike_note(evaluated)


def unlike_note(evaluated: Split) -> str:
    """Why balanced accuracy stands beside accuracy; "" where it does not."""
    if not are_unlike(evaluated.labels):
        return ""
    sizes = class_sizes(evaluated.labels)
    return (
        f" Balanced accuracy is the mean over the classes; it is shown because the largest class has {sizes.max():,} "
        f"{evaluated.name} images and the smallest {sizes.min():,}, more than {UNLIKE:g} times as many."
    )


def save_accuracies(path: Path, rows: Sequence[Row], evaluated: Split, *, title: str) -> None:
    """Each accuracy as a point with its interval or deviation: one colour per network, hollow for mean patches.

    A second panel shows balanced accuracies where classes are unlike.
    """
    from matplotlib.figure import Figure

    from experiments.figures.style import INK, save_figure, set_title

    probes = in_order(row.probe for row in rows)
    panels = {f"accuracy on the {evaluated.name} images (%)": rows}
    if are_unlike(evaluated.labels):
        panels["balanced accuracy (%)"] = [row.balanced for row in rows]
    figure = Figure(figsize=(5 + 4 * len(panels), 1.6 + 0.42 * len(probes)), layout="constrained", facecolor="white")
    for axes, (label, shown) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()):
        _draw_accuracies(axes, shown, probes, label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9,
                  labelcolor=INK)  # fmt: skip
    set_title(figure, title)
    save_figure(figure, path)


def _draw_accuracies(axes: Any, rows: Sequence[Row], probes: Sequence[str], label: str) -> None:
    from experiments.figures.style import BLUE, GREEN, MUTED, ORANGE, RED, bound_percent, style

    series = list(dict.fromkeys((row.network, CLS if row.features == CHOSEN else row.features) for row in rows))
    colors = {"teacher": BLUE, "student": ORANGE, UNTRAINED: MUTED, PIXELS: RED}
    for number, (network, features) in enumerate(series):
        hollow = features == MEAN_PATCH
        mine = [row for row in rows if row.network == network and (row.features == MEAN_PATCH) == hollow]
        heights = [probes.index(row.probe) + 0.7 * ((number + 0.5) / len(series) - 0.5) for row in mine]
        color = colors.get(network, GREEN)
        axes.errorbar(
            [100 * row.accuracy for row in mine], heights, xerr=np.array([_errors(row) for row in mine]).T,
            fmt="o", ms=5, lw=1, clip_on=False, color=color, mfc="white" if hollow else color,
            label=f"{network}, {FEATURE_TITLES[features]}",
        )  # fmt: skip
    style(axes, label, "")
    bound_percent(axes, "x")
    axes.set_yticks(range(len(probes)), [probe_title(probe) for probe in probes])
    axes.set_ylim(len(probes) - 0.5, -0.5)


def _errors(row: Row) -> tuple[float, float]:
    """Lengths of the error bar to the left and to the right, which end at 0 and 100 %."""
    if row.interval:
        return 100 * (row.accuracy - row.interval[0]), 100 * (row.interval[1] - row.accuracy)
    deviation = row.deviation or 0.0
    return 100 * min(deviation, row.accuracy), 100 * min(deviation, 1 - row.accuracy)


def save_probe_curves(folder: Path, rows: Sequence[Row], subject: str) -> None:
    """curves_NETWORK_FEATURES.png: loss and accuracy of the linear probe on crops by epoch."""
    for row in rows:
        if row.probe == "linear_crops":
            save_fit_curves(
                folder / f"curves_{'_'.join(dict.fromkeys([row.network, row.features]))}.png",
                row.details,
                selected_on="held-out training images",
                title=f"Linear probe on crops, {row.network}, {FEATURE_TITLES[row.features]}: {subject}",
            )


def save_fit_curves(path: Path, details: Mapping[str, Any], *, selected_on: str, title: str) -> None:
    """Loss and accuracy by epoch, from the details of a fit; `selected_on` names the images of the selection."""
    from experiments.figures.examples import save_curves

    train, heldout = (
        {key: np.asarray(details["curves"][f"{part}_{key}"]) for key in ("loss", "accuracy")}
        for part in ("train", "heldout")
    )
    save_curves(path, train, heldout, best_epoch=details["best_epoch"] - 1, heldout_name=selected_on, title=title)


def listing(folder: Path, files: Sequence[str]) -> str:
    """The files of a run; those of several classifiers stand on one line."""
    families: dict[str, list[str]] = {}
    for file in files:
        stem, _, suffix = file.partition(".")
        family, _, name = stem.partition("_")
        several = name and suffix in ("png", "csv")
        families.setdefault(f"{family}_*.{suffix}" if several else file, []).append(name)
    return "\n".join(
        f"  {folder / family}" + (f"   {', '.join(names)}" if "*" in family else "")
        for family, names in families.items()
    )
