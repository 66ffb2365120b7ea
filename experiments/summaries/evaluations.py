"""Tables of runs grouped by everything but their seed: means, deviations, and a test of transfer."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.probing.report import FEATURE_TITLES, in_order, probe_title
from experiments.summaries.results import EvaluatedRun, Key

_HEADLINES = {"k-NN": "knn_20", "linear": ("sweep", "linear_crops", "linear"), "5-shot": "5_shot_knn"}
# Accuracies and parameters: arXiv 2104.14294, Table 2, and the README of facebookresearch/dino, which also tells the
# time of 300 epochs: 2.6 days on 16 GPUs. The training images are those of ImageNet-1k.
_IMAGENET = 1_281_167
_PUBLISHED = (
    ("DINO ViT-S/16", "21 M", "–", "–", 74.5, 77.0),
    ("DINO ViT-S/16, the README's recipe", "21 M", "300", "998 GPU h (16 GPUs)", 73.3, 76.1),
    ("DINO ViT-B/16", "85 M", "–", "–", 76.1, 78.2),
    ("DINO ResNet-50", "23 M", "–", "–", 67.5, 75.3),
)
_SOURCE = "Lines of DINO: arXiv 2104.14294, Table 2, and the README of facebookresearch/dino; – is not given there."
_CLAIM = ("cifar100", "tinyimagenet")


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed.

    `values` has one accuracy for each of the differently trained weights, and `balanced` one balanced accuracy where
    classes are unlike.
    """

    runs: Sequence[EvaluatedRun]
    values: Mapping[Key, np.ndarray]
    balanced: Mapping[Key, np.ndarray]

    @property
    def first(self) -> EvaluatedRun:
        """A run, for what all of them have in common."""
        return self.runs[0]


def group(runs: Sequence[EvaluatedRun]) -> list[Group]:
    """Groups of runs with the same settings. Evaluations of the same weights are averaged, and count once."""
    by_settings: dict[str, list[EvaluatedRun]] = {}
    for run in runs:
        by_settings.setdefault(run.same, []).append(run)
    return [Group(found, _values(found, "accuracies"), _values(found, "balanced")) for found in by_settings.values()]


def _values(runs: Sequence[EvaluatedRun], numbers: str) -> dict[Key, np.ndarray]:
    by_weights: dict[Key, dict[str, list[float]]] = {}
    for run in runs:
        for key, accuracy in getattr(run, numbers).items():
            by_weights.setdefault(key, {}).setdefault(run.weights, []).append(accuracy)
    return {key: np.array([np.mean(found) for found in seen.values()]) for key, seen in by_weights.items()}


def cell(values: np.ndarray | None) -> str:
    """Per cent: mean ± standard deviation (n); a dash for nothing."""
    if values is None or not len(values):
        return "–"
    mean = f"{100 * values.mean():.2f}"
    return f"{mean} ± {100 * values.std(ddof=1):.2f} ({len(values)})" if len(values) > 1 else f"{mean} (1)"


def overview(groups: Sequence[Group]) -> str:
    """One line for each group, followed by those of the paper."""
    header = ["model", "trained on", "images", "parameters", "epochs", "compute", "evaluated on", *_HEADLINES]
    lines = []
    for one in groups:
        about, network = one.first.about, _main_network(one)
        images, parameters = about["images"], f"{about['parameters'] / 1e6:.1f} M"
        numbers = [_headline(one, network, probes) for probes in _HEADLINES.values()]
        lines.append([
            _name(one), one.first.trained_on or "–", f"{images:,}" if images else "–", parameters,
            str(about["epochs"] or "–"), _compute(one), one.first.evaluated_on, *numbers,
        ])  # fmt: skip
    for model, parameters, epochs, compute, knn, linear in _PUBLISHED:
        lines.append([model, "ImageNet", f"{_IMAGENET:,}", parameters, epochs, compute, "ImageNet, 224 px",
                      f"{knn:.1f}", f"{linear:.1f}", "–"])  # fmt: skip
    note = (
        "Accuracy in per cent of the test images, or of the validation images where the line says so: mean ± standard "
        "deviation (number of differently trained weights), "
        "of the teacher's CLS tokens; k-NN with k = 20; linear is the best of 52 heads, which may also use mean "
        "patches, selected on held-out training images (where there is no such sweep, the single linear probe); 5-shot "
        f"is k-NN. Compute is that of one run. {_SOURCE}"
    )
    return f"## Overview\n\n{markdown(header, lines)}\n\n{note}"


def _name(one: Group) -> str:
    return one.first.about["weights"] or one.first.about["model"]


def _main_network(one: Group) -> str:
    networks = [key[0] for key in one.values]
    return next(name for name in ("teacher", *networks) if name in networks)


def _headline(one: Group, network: str, probes: str | Sequence[str]) -> str:
    """The accuracy of the first of the probes that was evaluated, and the balanced one where classes are unlike."""
    for probe in [probes] if isinstance(probes, str) else probes:
        for features in ("chosen", "cls"):
            key = (network, features, probe)
            if key in one.values:
                return cell(one.values[key]) + (f", balanced {cell(one.balanced[key])}" if key in one.balanced else "")
    return cell(None)


def _compute(one: Group) -> str:
    seconds = [run.seconds for run in one.runs if run.seconds]
    return f"{np.mean(seconds) / 3600:.2g} {one.first.device} h" if seconds else "–"


def all_numbers(groups: Sequence[Group]) -> str:
    """Every probe of every network and kind of features, a table for each group.

    A line of balanced accuracies follows each probe where classes are unlike.
    """
    parts = []
    for one in groups:
        columns = list(dict.fromkeys((n, "cls" if f == "chosen" else f) for n, f, _ in one.values))
        header = ["probe", *(f"{network}, {FEATURE_TITLES[features]}" for network, features in columns)]
        lines = []
        for probe in in_order(probe for *_, probe in one.values):
            features = {"cls": "chosen"} if probe == "sweep" else {}
            keys = [(network, features.get(kind, kind), probe) for network, kind in columns]
            lines.append([probe_title(probe), *(cell(one.values.get(key)) for key in keys)])
            if one.balanced:
                lines.append([f"{probe_title(probe)}, balanced", *(cell(one.balanced.get(key)) for key in keys)])
        seeds = len({run.weights for run in one.runs})
        trained = f" trained on {one.first.trained_on}" if one.first.trained_on else ""
        parts.append(f"### {_name(one)}{trained}: {one.first.evaluated_on} (n = {seeds})\n\n{markdown(header, lines)}")
    return "## All numbers\n\n" + "\n\n".join(parts)


def transfer(groups: Sequence[Group]) -> str:
    """Whether CIFAR-100 transfers to STL-10 better than Tiny-ImageNet; empty where one of them is missing."""
    on_stl10 = [one for one in groups if _plain(one.first.evaluated_on).startswith("stl10")]
    sides = [[one for one in on_stl10 if _plain(one.first.trained_on).startswith(name)] for name in _CLAIM]
    pairs = [(x, y) for x in sides[0] for y in sides[1] if x.first.evaluated_on == y.first.evaluated_on]
    lines = [line for pair in pairs for line in _compared(*pair)]
    if not lines:
        return ""
    header = ["probe", "from CIFAR-100", "from Tiny-ImageNet", "difference", "95 % interval", "over", "better"]
    note = (
        "Over seeds: Welch's t interval of the difference of means. Over test images, where one side has a single "
        "seed: the two intervals combined, which do not cover other seeds."
    )
    return f"## Does CIFAR-100 transfer to STL-10 better than Tiny-ImageNet?\n\n{markdown(header, lines)}\n\n{note}"


def _compared(left: Group, right: Group) -> list[list[str]]:
    """A line for every probe that both were evaluated by, the teachers' first."""
    lines = []
    for network in ("teacher", "student"):
        shared = [key for key in left.values if key in right.values and key[0] == network]
        for probe in in_order(probe for *_, probe in shared):
            for key in (key for key in shared if key[2] == probe):
                one, other, found = left.values[key], right.values[key], difference(left, right, key)
                interval, over, better = "–", "–", "–"
                if found is not None:
                    low, high, over = found
                    interval = f"{100 * low:+.2f} to {100 * high:+.2f}"
                    better = "CIFAR-100" if low > 0 else "Tiny-ImageNet" if high < 0 else "undecided"
                name = f"{probe_title(probe)}, {network}, {FEATURE_TITLES[key[1]]}"
                mean = f"{100 * (one.mean() - other.mean()):+.2f}"
                lines.append([name, cell(one), cell(other), mean, interval, over, better])
    return lines


def difference(left: Group, right: Group, key: Key) -> tuple[float, float, str] | None:
    """The 95 % interval of the difference of means, and what it is over: "seeds" or "test images"."""
    one, other = left.values[key], right.values[key]
    if min(len(one), len(other)) > 1:
        from scipy.stats import ttest_ind

        if one.std() + other.std() == 0:
            return None
        low, high = ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
        return float(low), float(high), "seeds"
    # Newcombe (1998), method 10: from the Wilson intervals of two independent proportions.
    intervals = [side.first.intervals.get(key) for side in (left, right)]
    if None in intervals:
        return None
    p, q = left.first.accuracies[key], right.first.accuracies[key]
    (low_p, high_p), (low_q, high_q) = intervals
    lower, upper = np.hypot(p - low_p, high_q - q), np.hypot(high_p - p, q - low_q)
    return float(p - q - lower), float(p - q + upper), "test images"


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are also aligned in plain text."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rows = [header, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(word.ljust(width) for word, width in zip(row, widths)) + " |" for row in rows)
