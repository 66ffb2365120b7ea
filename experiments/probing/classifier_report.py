"""The report of `cifar10_probe`: predictions, metrics.json, the classifiers, their table and their figures."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data.splits import Dataset
from experiments.features.parts import FeatureParts
from experiments.probing.classifiers import TITLES, Prediction, save_classifiers
from experiments.probing.fitting import ON_TEST, Fit
from experiments.probing.metrics import compute_metrics, write_predictions
from experiments.probing.pipeline import EvaluatedProbe, Row
from experiments.probing.report import probe_title, save_fit_curves
from experiments.probing.result import Evaluator, describe
from experiments.runs import records
from experiments.runs.measure import PEAK_MEMORY, Cost

_EXAMPLES = 16  # correct ones, and as many wrong ones
_MAP_IMAGES = 3000


class Scored(NamedTuple):
    """A classifier, its predictions of both splits, their metrics, and what fitting and predicting cost."""

    fit: Fit
    train: Prediction
    test: Prediction
    metrics: Mapping[str, Any]
    fit_cost: Cost
    predict_cost: Cost

    def as_json(self) -> dict[str, Any]:
        """For `metrics.json`; the costs are apart, since they differ from run to run."""
        gap = self.metrics["train"]["accuracy"] - self.metrics["test"]["accuracy"]
        by_k = {str(k): accuracy for k, accuracy in self.metrics["by_k"].items()}
        return {
            "title": TITLES[self.fit.classifier.name],
            "selection": self.fit.selection,
            "test": self.metrics["test"],
            "train": self.metrics["train"],
            "train_test_gap": gap,
            **({"test_accuracy_by_k": by_k} if by_k else {}),
            "settings": dict(self.fit.classifier.settings),
            "fit": self.fit.details,
        }

    def cost_as_json(self) -> dict[str, Any]:
        """Seconds and peak memory."""
        return {"fit": dataclasses.asdict(self.fit_cost), "predict_test": dataclasses.asdict(self.predict_cost)}


def classifier_report(folder: Path, evaluator: Evaluator) -> tuple[Sequence[Row], str]:
    """Evaluates the network and writes all files; returns the rows and the table to print."""
    (found,) = evaluator.evaluate()
    config, dataset = evaluator.config, evaluator.dataset
    evaluator.write(folder, found.rows, {found.network: found.seconds})
    scored = {one.fitted.probe: _score(one, dataset, config.run.seed, folder) for one in found.probes}
    save_classifiers(folder, [one.fit.classifier for one in scored.values()], _description(evaluator))
    few_shot = {row.probe: row for row in found.rows if row.probe.partition("_shot_")[1]}
    metrics = {
        "dataset": describe(dataset),
        "untrained_baseline": evaluator.untrained,
        "protocol": config.probes.protocol,
        "classifiers": {name: one.as_json() for name, one in scored.items()},
        **({"few_shot": _few_shot(few_shot, config.probes.shots)} if few_shot else {}),
        "cost": {name: one.cost_as_json() for name, one in scored.items()},
        "peak_memory": PEAK_MEMORY,
        "features_seconds": round(found.seconds["features"], 3),
        "feature_dtype": evaluator.extractor.dtype.name,
        "environment": records.environment(),
    }
    records.write_json(folder / records.METRICS_FILE, metrics)
    if config.run.figures:
        print("drawing the figures", flush=True)
        options = {"subject": evaluator.subject, "seed": config.run.seed}
        draw(folder, dataset, scored, **options)
        draw_map(folder, dataset, found.test_features, method=config.run.map, **options)
    shown = table(scored, few_shot.values())
    return found.rows, f"{shown}\n{'features':23}{found.seconds['features']:53.1f}"


def _score(evaluated: EvaluatedProbe, dataset: Dataset, seed: int, folder: Path) -> Scored:
    """Writes the predictions of all images to a file, and computes their metrics."""
    (fit,), (test,), (train,) = evaluated.fitted.fits, evaluated.test, evaluated.train
    path = folder / f"predictions_{fit.classifier.name}.csv"
    write_predictions(path, [(dataset.train, train), (dataset.test, test)], dataset.class_names)
    labels = dataset.test.labels
    metrics = {
        "test": compute_metrics(labels, test, dataset.class_names, seed=seed),
        "train": compute_metrics(dataset.train.labels, train, dataset.class_names, seed=seed),
        "by_k": {k: float(np.mean(classes == labels)) for k, classes in sorted(test.by_k.items())},
    }
    return Scored(fit, train, test, metrics, evaluated.fitted.cost, evaluated.predict_cost)


def _few_shot(rows: Mapping[str, Row], shots: int) -> dict[str, Any]:
    accuracies = {probe.partition("_shot_")[2]: list(row.accuracies) for probe, row in rows.items()}
    return {"shots": shots, "test_accuracy": accuracies}


def _description(evaluator: Evaluator) -> dict[str, Any]:
    """What the classifiers expect; with it, `predict` computes the same features of other images."""
    config, extractor = evaluator.config, evaluator.extractor
    (backbone,) = evaluator.backbones.values()
    path = Path(backbone.weights).expanduser()
    return {
        "weights": str(path.resolve()) if path.exists() else config.model.weights,
        "weights_fingerprint": extractor.fingerprint,
        "normalisation": backbone.normalisation,
        "seed": config.run.seed,
        "image_size": extractor.image_size,
        "dtype": extractor.dtype.name,
        "class_names": list(evaluator.dataset.class_names),
        "protocol": config.probes.protocol,
    }


def table(scored: Mapping[str, Scored], few_shot: Collection[Row]) -> str:
    """All classifiers, one per line: per cent, seconds and MiB."""
    lines = [
        f"{'':23}{'test %':>7}  {'95 % interval':14}{'train %':>8}{'gap':>7}{'F1 %':>7}   {'fit s':>7}{'MiB':>7}"
        f"   {'predict s':>9}{'MiB':>7}   selection"
    ]
    for name, one in scored.items():
        test, train = one.metrics["test"], one.metrics["train"]
        low, high = (f"{100 * end:.2f}" for end in test["interval"]["accuracy"])
        lines.append(
            f"{TITLES[name]:23}{100 * test['accuracy']:7.2f}  {f'{low} – {high}':14}{100 * train['accuracy']:8.2f}"
            f"{100 * (train['accuracy'] - test['accuracy']):7.2f}{100 * test['weighted_f1']:7.2f}   "
            f"{one.fit_cost.seconds:7.1f}{_mib(one.fit_cost)}   {one.predict_cost.seconds:9.2f}"
            f"{_mib(one.predict_cost)}   {_selection(one)}"
        )
    for row in few_shot:
        deviation = f"± {100 * row.deviation:.2f}" if row.deviation is not None else ""
        lines.append(
            f"{probe_title(row.probe):23}{100 * row.accuracy:7.2f}  {deviation:14}{'':51}   "
            f"mean and deviation of {len(row.accuracies)} random draws"
        )
    return "\n".join(lines)


def _mib(cost: Cost) -> str:
    return f"{'–':>7}" if cost.peak_mib is None else f"{cost.peak_mib:7.0f}"


def _selection(scored: Scored) -> str:
    details, settings = scored.fit.details, scored.fit.classifier.settings
    if "k" in settings:
        others = ", ".join(f"k={k} {100 * a:.2f}" for k, a in scored.metrics["by_k"].items() if k != settings["k"])
        return f"k={settings['k']}" + (f"   ({others})" if others else "")
    if "best_epoch" in details:
        return f"epoch {details['best_epoch']} of {details['epochs']}, {scored.fit.selection}"
    if "best" in details:
        shown = {"learning_rate": "lr", "mean_patch": "mean patch"}
        best = ", ".join(f"{shown.get(k, k)} {_number(v)}" for k, v in details["best"].items() if k != "accuracy")
        return f"{best}, {scored.fit.selection}"
    return f"{details['support_vectors']:,} support vectors, no probabilities"


def _number(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value:.3g}"


def draw(folder: Path, dataset: Dataset, scored: Mapping[str, Scored], *, subject: str, seed: int) -> None:
    """Draws every figure of the classifiers; `subject` names the weights and the data in every title."""
    from experiments.figures.results import save_bars, save_confusion

    note = f" ({ON_TEST})" if any(one.fit.selection == ON_TEST for one in scored.values()) else ""
    metrics = {name: one.metrics for name, one in scored.items()}
    save_bars(folder / "metrics.png", metrics, TITLES, title=f"{subject}{note}")
    for name, one in scored.items():
        accuracy = 100 * one.metrics["test"]["accuracy"]
        note = f", {ON_TEST}" if one.fit.selection == ON_TEST else ""
        title = f"{TITLES[name]}{note}: {accuracy:.1f} % of the test images correct\n{subject}"
        confusion = np.array(one.metrics["test"]["confusion"])
        save_confusion(folder / f"confusion_{name}.png", confusion, dataset.class_names, title=title)
        _draw_training(folder, one, subject)
        _draw_examples(folder, dataset, one, subject, seed)


def _draw_training(folder: Path, scored: Scored, subject: str) -> None:
    """Draws curves by epoch, or the accuracy over a grid of settings."""
    from experiments.figures.results import save_grid

    name, details = scored.fit.classifier.name, scored.fit.details
    title = f"{TITLES[name]}, {scored.fit.selection}\n{subject}"
    images = "test images" if scored.fit.selection == ON_TEST else "held-out training images"
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


def _draw_examples(folder: Path, dataset: Dataset, scored: Scored, subject: str, seed: int) -> None:
    """Draws correctly and wrongly classified images of both splits, chosen at random."""
    from experiments.figures.examples import save_predictions

    name = scored.fit.classifier.name
    for split, prediction in ((dataset.train, scored.train), (dataset.test, scored.test)):
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
    title = f"Features of {len(chosen):,} test images by class\n{subject}"
    save_map(folder / "map.png", points, labels, dataset.class_names, axis_labels=axis_labels, title=title)
