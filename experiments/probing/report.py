"""What a run of the probes shows: the table of all classifiers, and their figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.splits import Dataset
from experiments.probing.classifiers import TITLES, Features, pick_tokens
from experiments.probing.fitting import ON_TEST
from experiments.probing.judging import Judged
from experiments.runs.measure import Cost

_EXAMPLES = 16  # right ones, and as many wrong ones
_MAP_IMAGES = 3000


def table(judged: Mapping[str, Judged], few_shot: Mapping[str, Sequence[float]], shots: int) -> str:
    """All classifiers, one a line: per cent, seconds and MiB."""
    lines = [
        f"{'':23}{'test %':>7}  {'95 % interval':14}{'train %':>8}{'gap':>7}{'F1 %':>7}   {'fit s':>7}{'MiB':>7}"
        f"   {'predict s':>9}{'MiB':>7}   choice"
    ]
    for name, one in judged.items():
        test, train = one.metrics["test"], one.metrics["train"]
        low, high = (f"{100 * end:.2f}" for end in test["interval"]["accuracy"])
        lines.append(
            f"{TITLES[name]:23}{100 * test['accuracy']:7.2f}  {f'{low} – {high}':14}{100 * train['accuracy']:8.2f}"
            f"{100 * (train['accuracy'] - test['accuracy']):7.2f}{100 * test['weighted_f1']:7.2f}   "
            f"{one.fit_cost.seconds:7.1f}{_mib(one.fit_cost)}   {one.predict_cost.seconds:9.2f}"
            f"{_mib(one.predict_cost)}   {_choice(one)}"
        )
    for method, accuracies in few_shot.items():
        percent = 100 * np.asarray(accuracies)
        deviation = f"± {percent.std(ddof=1):.2f}" if len(percent) > 1 else ""
        label = {"1nn": "1-NN", "knn": "k-NN"}.get(method, method)
        lines.append(
            f"{f'{shots}-shot {label}':23}{percent.mean():7.2f}  {deviation:14}{'':51}   "
            f"mean and deviation of {len(percent)} draws of {shots} images a class"
        )
    return "\n".join(lines)


def listing(folder: Path, files: Sequence[str]) -> str:
    """The files of a run, those of several classifiers on one line."""
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


def _mib(cost: Cost) -> str:
    return f"{'–':>7}" if cost.peak_mib is None else f"{cost.peak_mib:7.0f}"


def _choice(judged: Judged) -> str:
    details, settings = judged.fit.details, judged.fit.classifier.settings
    if "k" in settings:
        others = ", ".join(f"k={k} {100 * a:.2f}" for k, a in judged.metrics["by_k"].items() if k != settings["k"])
        return f"k={settings['k']}" + (f"   ({others})" if others else "")
    if "best_epoch" in details:
        return f"epoch {details['best_epoch']} of {details['epochs']}, {judged.fit.selection}"
    if "best" in details:
        shown = {"learning_rate": "lr", "mean_patch": "mean patch"}
        best = ", ".join(f"{shown.get(k, k)} {_number(v)}" for k, v in details["best"].items() if k != "accuracy")
        return f"{best}, {judged.fit.selection}"
    return f"{details['support_vectors']:,} support vectors, no probabilities"


def _number(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value:.3g}"


def draw(folder: Path, dataset: Dataset, judged: Mapping[str, Judged], *, subject: str, seed: int) -> None:
    """Every figure of the classifiers; `subject` says in every title what was classified with what."""
    from experiments.figures.results import save_bars, save_confusion

    note = f" ({ON_TEST})" if any(one.fit.selection == ON_TEST for one in judged.values()) else ""
    metrics = {name: one.metrics for name, one in judged.items()}
    save_bars(folder / "metrics.png", metrics, TITLES, title=f"{subject}{note}")
    for name, one in judged.items():
        accuracy = 100 * one.metrics["test"]["accuracy"]
        note = f", {ON_TEST}" if one.fit.selection == ON_TEST else ""
        title = f"{TITLES[name]}{note}: {accuracy:.1f} % of the test images are right\n{subject}"
        confusion = np.array(one.metrics["test"]["confusion"])
        save_confusion(folder / f"confusion_{name}.png", confusion, dataset.class_names, title=title)
        _draw_training(folder, one, subject)
        _draw_examples(folder, dataset, one, subject, seed)


def _draw_training(folder: Path, judged: Judged, subject: str) -> None:
    """Curves by epoch, or accuracy over the grid of settings."""
    from experiments.figures.examples import save_curves
    from experiments.figures.results import save_grid

    name, details = judged.fit.classifier.name, judged.fit.details
    title = f"{TITLES[name]}, {judged.fit.selection}\n{subject}"
    images = "test images" if judged.fit.selection == ON_TEST else "held-out training images"
    if "curves" in details:
        train, heldout = (
            {key: np.asarray(details["curves"][f"{part}_{key}"]) for key in ("loss", "accuracy")}
            for part in ("train", "heldout")
        )
        options = {"best_epoch": details["best_epoch"] - 1, "heldout_name": images}
        save_curves(folder / f"curves_{name}.png", train, heldout, **options, title=title)
    if "grid" in details:
        x = "C" if name == "logistic" else "learning_rate"
        lines: dict[str, list[float]] = {}
        for point in details["grid"]:
            lines.setdefault(_variant(point), []).append(point["accuracy"])
        save_grid(
            folder / f"selection_{name}.png",
            list(dict.fromkeys(point[x] for point in details["grid"])),
            lines,
            (details["best"][x], details["best"]["accuracy"]),
            xlabel={"C": "C (inverse strength of the penalty)"}.get(x, "learning rate at batch 256"),
            ylabel=f"accuracy on {images} (%)",
            title=title,
        )


def _variant(point: Mapping[str, Any]) -> str:
    if "blocks" not in point:
        return "logistic regression"
    blocks = "CLS" if point["blocks"] == 1 else f"CLS of {point['blocks']} blocks"
    return blocks + (" and mean patch" if point["mean_patch"] else "")


def _draw_examples(folder: Path, dataset: Dataset, judged: Judged, subject: str, seed: int) -> None:
    """Right and wrong images of both splits, drawn at random."""
    from experiments.figures.examples import save_predictions

    name = judged.fit.classifier.name
    for split, prediction in ((dataset.train, judged.train), (dataset.test, judged.test)):
        hits = prediction.classes == split.labels
        order = np.random.default_rng(seed).permutation(len(hits))
        chosen = np.concatenate([order[hits[order]][:_EXAMPLES], order[~hits[order]][:_EXAMPLES]])
        save_predictions(
            folder / f"examples_{name}_{split.name}.png",
            [split.read(int(i)) for i in chosen],
            split.labels[chosen],
            prediction.classes[chosen],
            prediction.confidence[chosen],
            dataset.class_names,
            title=f"{TITLES[name]}: {100 * hits.mean():.1f} % of the {split.name} images are right · {subject}",
        )


def draw_map(folder: Path, dataset: Dataset, features: Features, *, method: str, subject: str, seed: int) -> None:
    """The test images in the plane, by the last CLS token: "pca" or "tsne"."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    from experiments.figures.results import save_map

    chosen = np.sort(np.random.default_rng(seed).permutation(len(features))[:_MAP_IMAGES])
    inputs = pick_tokens(features[chosen]).astype(np.float64)
    if method == "tsne":
        perplexity = min(30, (len(inputs) - 1) / 3)
        with threadpool_limits(1):  # its threads would spin for cores that JAX's hold: many times slower
            points = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(inputs)
        axis_labels = ("t-SNE 1", "t-SNE 2")
    else:
        pca = PCA(2, svd_solver="full").fit(inputs)
        points = pca.transform(inputs)
        axis_labels = tuple(
            f"component {i + 1} ({100 * r:.0f} % of the variance)" for i, r in enumerate(pca.explained_variance_ratio_)
        )
    labels = dataset.test.labels[chosen]
    title = f"Features of {len(chosen):,} test images by class\n{subject}"
    save_map(folder / "map.png", points, labels, dataset.class_names, axis_labels=axis_labels, title=title)
