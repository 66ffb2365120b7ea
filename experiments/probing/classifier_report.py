"""The report of `cifar10_probe`: predictions, metrics.json, the classifiers, their table and their figures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.splits import Dataset, Split
from experiments.features.parts import FeatureParts
from experiments.probing.classifiers import TITLES, Prediction, save_classifiers
from experiments.probing.fitting import selected_on
from experiments.probing.metrics import are_unlike, compute_metrics, write_predictions
from experiments.probing.pipeline import EvaluatedProbe, Row
from experiments.probing.report import probe_title, save_fit_curves, unlike_note
from experiments.probing.result import Evaluator, Reported, describe
from experiments.runs import records
from experiments.runs.measure import PEAK_MEMORY

_EXAMPLES = 16  # correct ones, and as many wrong ones
_MAP_IMAGES = 3000


def classifier_report(folder: Path, evaluator: Evaluator) -> Reported:
    """Evaluates the network, and writes the results."""
    (found,) = evaluator.evaluations()
    config, dataset = evaluator.config, evaluator.dataset
    evaluator.write(folder, found.rows, {found.network: found.seconds})
    probes = {one.probe: one for one in found.probes}
    for name, one in probes.items():
        predictions = [(dataset.train, one.train[0]), (dataset.test, one.test[0])]
        write_predictions(folder / f"predictions_{name}.csv", predictions, dataset.class_names)
    save_classifiers(folder, [one.fits[0].classifier for one in found.probes], _description(evaluator))
    few_shot = [row for row in found.rows if "_shot_" in row.probe]
    metrics = {
        "dataset": describe(dataset),
        "untrained_baseline": evaluator.untrained,
        "protocol": config.probes.protocol,
        "classifiers": {name: _metrics(one, dataset, config.run.seed) for name, one in probes.items()},
        **({"few_shot": _few_shot(few_shot, config.probes.shots)} if few_shot else {}),
        "cost": {
            name: {"fit": asdict(one.fit_cost), "predict_test": asdict(one.predict_cost)}
            for name, one in probes.items()
        },
        "peak_memory": PEAK_MEMORY,
        "features_seconds": round(found.seconds["features"], 3),
        "feature_dtype": evaluator.extractor.dtype.name,
        "environment": records.environment(),
    }
    records.write_json(folder / records.METRICS_FILE, metrics)

    def draw_all(folder: Path) -> None:
        print("drawing the figures", flush=True)
        options = {"subject": evaluator.subject, "seed": config.run.seed}
        draw(folder, dataset, probes, metrics["classifiers"], **options)
        draw_map(folder, dataset, found.test_features, method=config.run.map, **options)

    text = table(metrics, few_shot, dataset.test.name, balanced=are_unlike(dataset.test.labels))
    return Reported(found.rows, "\n\n".join(filter(None, (text, unlike_note(dataset.test).strip()))), draw_all)


def _metrics(evaluated: EvaluatedProbe, dataset: Dataset, seed: int) -> dict[str, Any]:
    """What metrics.json holds of a classifier; the costs are apart, since they differ from run to run."""
    (fit,), (test,), (train,) = evaluated.fits, evaluated.test, evaluated.train
    metrics = {
        name: compute_metrics(split.labels, prediction, dataset.class_names, seed=seed)
        for name, split, prediction in (("test", dataset.test, test), ("train", dataset.train, train))
    }
    by_k = {str(k): float(np.mean(classes == dataset.test.labels)) for k, classes in sorted(test.by_k.items())}
    return {
        "title": TITLES[evaluated.probe],
        "selection": fit.selection,
        **metrics,
        "train_test_gap": metrics["train"]["accuracy"] - metrics["test"]["accuracy"],
        **({"test_accuracy_by_k": by_k} if by_k else {}),
        "settings": dict(fit.classifier.settings),
        "fit": fit.details,
    }


def _few_shot(rows: Sequence[Row], shots: int) -> dict[str, Any]:
    accuracies = {row.probe.partition("_shot_")[2]: list(row.accuracies) for row in rows}
    return {"shots": shots, "test_accuracy": accuracies}


def _description(evaluator: Evaluator) -> dict[str, Any]:
    """What the classifiers expect; with it, `predict` computes the same features of other images."""
    config, extractor = evaluator.config, evaluator.extractor
    (backbone,) = evaluator.backbones.values()
    path = Path(backbone.weights).expanduser()
    return {
        "weights": str(path.resolve()) if path.exists() else backbone.weights,
        "weights_fingerprint": extractor.fingerprint,
        "normalisation": backbone.normalisation,
        "seed": config.run.seed,
        "image_size": extractor.image_size,
        "dtype": extractor.dtype.name,
        "class_names": list(evaluator.dataset.class_names),
        "protocol": config.probes.protocol,
    }


def table(
    metrics: Mapping[str, Any], few_shot: Sequence[Row], evaluated: str = "test", *, balanced: bool = False
) -> str:
    """All classifiers, one per line: per cent, seconds and MiB.

    Args:
        metrics: the content of metrics.json.
        few_shot: rows of few-shot classifiers.
        evaluated: what the evaluated images are called: "test" or "validation".
        balanced: whether to show balanced accuracy beside accuracy.
    """
    first = f"{evaluated} %"
    width, extra = max(7, len(first) + 1), f"{'balanced %':>12}" if balanced else ""
    lines = [
        f"{'':23}{first:>{width}}  {'95 % interval':14}{extra}{'train %':>8}{'gap':>7}{'weighted F1 %':>15}"
        f"   {'fit s':>7}{'MiB':>7}   {'predict s':>9}{'MiB':>7}   selection"
    ]
    for name, one in metrics["classifiers"].items():
        test, train, (fitting, predicting) = one["test"], one["train"], metrics["cost"][name].values()
        low, high = (f"{100 * end:.2f}" for end in test["interval"]["accuracy"])
        even = f"{100 * test['balanced_accuracy']:12.2f}" if balanced else ""
        lines.append(
            f"{one['title']:23}{100 * test['accuracy']:{width}.2f}  {f'{low} – {high}':14}{even}"
            f"{100 * train['accuracy']:8.2f}{100 * one['train_test_gap']:7.2f}{100 * test['weighted_f1']:15.2f}   "
            f"{fitting['seconds']:7.1f}{_mib(fitting)}   {predicting['seconds']:9.2f}{_mib(predicting)}   "
            f"{_selection(one)}"
        )
    for row in few_shot:
        deviation = f"± {100 * row.deviation:.2f}" if row.deviation is not None else ""
        even = f"{100 * row.balanced.accuracy:12.2f}" if balanced else ""
        note = f"mean and deviation of {len(row.accuracies)} random draws"
        accuracy = f"{100 * row.accuracy:{width}.2f}"
        lines.append(f"{probe_title(row.probe):23}{accuracy}  {deviation:14}{even}{'':66}   {note}")
    filled = 56 + width + len(extra)
    return "\n".join([*lines, f"{'features':23}{metrics['features_seconds']:{filled}.1f}"])


def _mib(cost: Mapping[str, float | None]) -> str:
    return f"{'–':>7}" if cost["peak_mib"] is None else f"{cost['peak_mib']:7.0f}"


def _selection(metrics: Mapping[str, Any]) -> str:
    details, settings, images = metrics["fit"], metrics["settings"], metrics["selection"]
    if "k" in settings:
        by_k = metrics.get("test_accuracy_by_k", {}).items()
        others = ", ".join(f"k={k} {100 * accuracy:.2f}" for k, accuracy in by_k if k != str(settings["k"]))
        return f"k={settings['k']}" + (f"   ({others})" if others else "")
    if "best_epoch" in details:
        return f"epoch {details['best_epoch']} of {details['epochs']}, {images}"
    if "best" in details:
        shown = {"learning_rate": "lr", "mean_patch": "mean patch"}
        best = ", ".join(f"{shown.get(k, k)} {_number(v)}" for k, v in details["best"].items() if k != "accuracy")
        return f"{best}, {images}"
    return f"{details['support_vectors']:,} support vectors, no probabilities"


def _number(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value:.3g}"


def draw(
    folder: Path,
    dataset: Dataset,
    probes: Mapping[str, EvaluatedProbe],
    metrics: Mapping[str, Mapping[str, Any]],
    *,
    subject: str,
    seed: int,
) -> None:
    """Draws every figure of the classifiers; `subject` names the weights and the data in every title."""
    from experiments.figures.results import save_bars, save_confusion

    evaluated, balanced = dataset.test.name, are_unlike(dataset.test.labels)
    optimistic = selected_on(evaluated)
    note = f" ({optimistic})" if any(one["selection"] == optimistic for one in metrics.values()) else ""
    options = {"evaluated": evaluated, "balanced": balanced, "title": f"{subject}{note}"}
    save_bars(folder / "metrics.png", metrics, TITLES, **options)
    for name, one in metrics.items():
        note = f", {optimistic}" if one["selection"] == optimistic else ""
        even = f" (balanced: {100 * one['test']['balanced_accuracy']:.1f} %)" if balanced else ""
        correct = f"{100 * one['test']['accuracy']:.1f} % of the {evaluated} images correct{even}"
        title = f"{TITLES[name]}{note}: {correct}\n{subject}"
        confusion = np.array(one["test"]["confusion"])
        save_confusion(folder / f"confusion_{name}.png", confusion, dataset.class_names, title=title)
        _draw_selection(folder, name, one, evaluated, subject)
        for split, prediction in ((dataset.train, probes[name].train[0]), (dataset.test, probes[name].test[0])):
            _draw_examples(folder, name, split, prediction, dataset.class_names, subject, seed)


def _draw_selection(folder: Path, name: str, metrics: Mapping[str, Any], evaluated: str, subject: str) -> None:
    """Draws curves by epoch, or the accuracy over a grid of settings."""
    from experiments.figures.results import save_grid

    details, title = metrics["fit"], f"{TITLES[name]}, {metrics['selection']}\n{subject}"
    images = f"{evaluated} images" if metrics["selection"] == selected_on(evaluated) else "held-out training images"
    if "curves" in details:
        save_fit_curves(folder / f"curves_{name}.png", details, selected_on=images, title=title)
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


def _draw_examples(
    folder: Path,
    name: str,
    split: Split,
    prediction: Prediction,
    class_names: Sequence[str],
    subject: str,
    seed: int,
) -> None:
    """Draws correctly and wrongly classified images of a split, at random."""
    from experiments.figures.examples import save_predictions

    hits = prediction.classes == split.labels
    order = np.random.default_rng(seed).permutation(len(hits))
    chosen = np.concatenate([order[hits[order]][:_EXAMPLES], order[~hits[order]][:_EXAMPLES]])
    save_predictions(
        folder / f"examples_{name}_{split.name}.png",
        [split.read(int(i)) for i in chosen],
        split.labels[chosen],
        prediction.classes[chosen],
        prediction.confidence[chosen],
        class_names,
        title=f"{TITLES[name]}: {100 * hits.mean():.1f} % of the {split.name} images correct · {subject}",
    )


def draw_map(folder: Path, dataset: Dataset, features: FeatureParts, *, method: str, subject: str, seed: int) -> None:
    """Draws the last CLS tokens of the test images in the plane; `method` is "pca" or "tsne"."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    from experiments.figures.results import save_map

    chosen = np.sort(np.random.default_rng(seed).permutation(len(features))[:_MAP_IMAGES])
    inputs = features[chosen].vectors().astype(np.float64)
    if method == "tsne":
        perplexity = min(30, (len(inputs) - 1) / 3)
        with threadpool_limits(1):  # its threads would compete with JAX's for the cores, and take many times longer
            points = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(inputs)
        axis_labels = ("t-SNE 1", "t-SNE 2")
    else:
        pca = PCA(2, svd_solver="full").fit(inputs)
        points = pca.transform(inputs)
        axis_labels = tuple(
            f"component {i + 1} ({100 * r:.0f} % of the variance)" for i, r in enumerate(pca.explained_variance_ratio_)
        )
    labels = dataset.test.labels[chosen]
    title = f"Features of {len(chosen):,} {dataset.test.name} images by class\n{subject}"
    save_map(folder / "map.png", points, labels, dataset.class_names, axis_labels=axis_labels, title=title)
