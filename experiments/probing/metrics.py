"""Metrics of predictions: scikit-learn's, with bootstrap intervals; and every prediction as a table."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from experiments.data.splits import Split
from experiments.probing.classifiers import Prediction

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
TOP = 5
_RESAMPLES_AT_ONCE = 50
UNLIKE = 1.5  # images of the largest class over those of the smallest


def are_unlike(labels: Int[np.ndarray, " images"]) -> bool:
    """Whether the largest class among `labels` has more than 1.5 times the images of the smallest.

    Balanced accuracy then stands beside accuracy.
    """
    counts = class_sizes(labels)
    return bool(counts.max() > UNLIKE * counts.min())


def class_sizes(labels: Int[np.ndarray, " images"]) -> Int[np.ndarray, " classes"]:
    """Number of images of each class that has any."""
    counts = np.bincount(labels)
    return counts[counts > 0]


def balanced_accuracy(labels: Int[np.ndarray, " images"], predicted: Int[np.ndarray, " images"]) -> float:
    """The mean over the classes that occur among `labels` of the share of their images that is recognised."""
    hits, sizes = np.bincount(labels, weights=predicted == labels), np.bincount(labels)
    return float(np.mean(hits[sizes > 0] / sizes[sizes > 0]))


def compute_metrics(
    labels: Int[np.ndarray, " images"], prediction: Prediction, class_names: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """Metrics of one set of predictions, as JSON.

    "accuracy"; "balanced_accuracy", the mean recall of the classes that occur among the labels; "<average>_<precision |
    recall | f1>" for the averages weighted and macro (over the classes that occur among labels or predictions; what is
    undefined counts as 0, as in scikit-learn); "top5_accuracy" where there are more than five classes; "interval" holds
    the 95 % bootstrap interval of each over the images; "confusion" counts images by true class (row) and predicted
    class; "per_class_accuracy" is None for a class without images.

    Args:
        labels: true classes.
        prediction: of the same images.
        class_names: by class index.
        seed: of the bootstrap.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    metrics: dict[str, Any] = {
        "images": len(labels),
        "accuracy": float(accuracy_score(labels, prediction.classes)),
        "balanced_accuracy": balanced_accuracy(labels, prediction.classes),
    }
    for average in ("weighted", "macro"):
        values = precision_recall_fscore_support(labels, prediction.classes, average=average, zero_division=0)
        metrics |= {f"{average}_{name}": float(value) for name, value in zip(("precision", "recall", "f1"), values)}
    confusion = confusion_matrix(labels, prediction.classes, labels=range(len(class_names)))
    rng = np.random.default_rng(seed)
    resampled = resample_metrics(confusion, rng)
    if len(class_names) > TOP:
        metrics["top5_accuracy"] = top_accuracy(labels, prediction.scores)
        hits = rng.binomial(len(labels), metrics["top5_accuracy"], RESAMPLES)
        resampled["top5_accuracy"] = hits / len(labels)
    metrics["interval"] = {name: np.percentile(values, INTERVAL).tolist() for name, values in resampled.items()}
    sizes = confusion.sum(axis=1)
    metrics["per_class_accuracy"] = {
        name: float(hits / size) if size else None for name, hits, size in zip(class_names, confusion.diagonal(), sizes)
    }
    metrics["confusion"] = confusion.tolist()
    return metrics


def resample_metrics(
    confusion: Int[np.ndarray, "classes classes"], rng: np.random.Generator
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """Accuracy, balanced accuracy and averaged precision, recall and F1 of images resampled with replacement.

    All of them depend on the counts of the confusion matrix alone, and those of resampled images are multinomial: the
    counts are drawn at once instead of images one by one.
    """
    from scipy.sparse import csr_array

    true, predicted = np.nonzero(confusion)
    counts, total = confusion[true, predicted], int(confusion.sum())
    cells, shape = np.arange(len(counts)), (len(counts), len(confusion))
    by_true, by_predicted, by_hit = (
        csr_array((values, (cells, classes)), shape=shape)
        for values, classes in (
            (np.ones(len(cells)), true),
            (np.ones(len(cells)), predicted),
            (true == predicted, true),
        )
    )
    parts = []
    for start in range(0, RESAMPLES, _RESAMPLES_AT_ONCE):
        drawn = rng.multinomial(total, counts / total, min(_RESAMPLES_AT_ONCE, RESAMPLES - start)).astype(float)
        parts.append(_averages(drawn @ by_hit, drawn @ by_true, drawn @ by_predicted))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _averages(
    hits: Float[np.ndarray, "draws classes"],
    support: Float[np.ndarray, "draws classes"],
    predicted: Float[np.ndarray, "draws classes"],
) -> dict[str, Float[np.ndarray, " draws"]]:
    """Every metric from each class's counts of hits, images and predictions."""
    precision, recall, f1 = (
        np.divide(a, b, out=np.zeros_like(hits), where=b > 0)
        for a, b in ((hits, predicted), (hits, support), (2 * hits, support + predicted))
    )
    occurring = (support > 0).sum(axis=1)
    averages = {
        "accuracy": hits.sum(axis=1) / support.sum(axis=1),
        "balanced_accuracy": recall.sum(axis=1) / occurring,
    }
    for average, weights in (("weighted", support), ("macro", (support + predicted > 0).astype(float))):
        weights = weights / weights.sum(axis=1, keepdims=True)
        for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
            averages[f"{average}_{name}"] = (weights * values).sum(axis=1)
    return averages


def top_accuracy(labels: Int[np.ndarray, " images"], scores: Float[np.ndarray, "images classes"]) -> float:
    """The share of images whose class is among the five of highest score, ties to the lower class index."""
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    return float((ranked == labels[:, None]).any(axis=1).mean())


def write_predictions(path: Path, predictions: Sequence[tuple[Split, Prediction]], class_names: Sequence[str]) -> None:
    """Every prediction as CSV: split, id, true, predicted, probability (empty where there is none)."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("split", "id", "true", "predicted", "probability"))
        for split, prediction in predictions:
            confidence = [f"{p:.6f}" for p in prediction.confidence] if prediction.are_probabilities else None
            for i, (label, predicted) in enumerate(zip(split.labels, prediction.classes)):
                shown = confidence[i] if confidence else ""
                writer.writerow((split.name, split.ids[i], class_names[label], class_names[predicted], shown))
