"""Fits the classifiers, opens the test set once, and judges them on it: predictions, metrics and costs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from dinojax.probes import few_shot, split_heldout
from experiments.data.splits import Dataset
from experiments.probing.classifiers import TITLES, Features, Prediction, pick_tokens
from experiments.probing.fitting import Fit, Settings, TrainingData, fit
from experiments.probing.metrics import evaluate, write_predictions
from experiments.runs.measure import Cost, measured

FEW_SHOT = "few_shot"
_DRAWS = 5


class SealedTest:
    """Features and labels of the test images, behind a seal that can be broken once."""

    def __init__(self, features: Features, labels: Int[np.ndarray, " images"]):
        self._content: tuple[np.ndarray, np.ndarray] | None = (features, labels)

    def open(self) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels; a second call is a bug."""
        if self._content is None:
            raise RuntimeError("the test set was opened before: nothing may be chosen after a look at it")
        content, self._content = self._content, None
        return content


@dataclasses.dataclass(frozen=True)
class Judged:
    """A fitted classifier, what it says of both splits, what that is worth, and what it cost."""

    fit: Fit
    train: Prediction
    test: Prediction
    metrics: Mapping[str, Any]
    fit_cost: Cost
    predict_cost: Cost

    def as_json(self) -> dict[str, Any]:
        """For `metrics.json`; the costs are apart, since they differ from run to run."""
        gap = self.metrics["train"]["accuracy"] - self.metrics["test"]["accuracy"]
        by_k = {str(k): classes for k, classes in self.metrics["by_k"].items()}
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


def judge(
    names: Sequence[str],
    dataset: Dataset,
    train: Features,
    views: Sequence[Features],
    sealed: SealedTest,
    settings: Settings,
    folder: Path,
) -> tuple[dict[str, Judged], dict[str, list[float]]]:
    """Fits everything, and only then opens the test set (unless the protocol is to choose on it).

    Args:
        names: of `TITLES`, or "few_shot".
        dataset: whose labels of the training images are learnt from.
        train: features of the training images.
        views: features of augmented views of them.
        sealed: the test set.
        settings: of the fits.
        folder: gets a CSV file with every prediction of each classifier.

    Returns:
        The classifiers by name, and the few-shot test accuracies of several draws by method.
    """
    kept, heldout = split_heldout(dataset.train.labels, settings.heldout_fraction, settings.seed)
    test = sealed.open() if settings.protocol == "seed" else None
    classes = len(dataset.class_names)
    data = TrainingData(train, dataset.train.labels, classes, kept, heldout, views=views, test=test)
    fits = {}
    for name in names:
        if name != FEW_SHOT:
            print(f"fitting {name} …", flush=True)
            with measured() as cost:
                fits[name] = fit(name, data, settings), cost
    test = test or sealed.open()
    judged = {}
    for name, (fitted, cost) in fits.items():
        print(f"judging {name} …", flush=True)
        judged[name] = _judge_one(fitted, cost, dataset, train, test, settings.seed, folder)
    return judged, _few_shot(data, test, settings) if FEW_SHOT in names else {}


def _judge_one(
    fitted: Fit, fit_cost: Cost, dataset: Dataset, train: Features, test: tuple, seed: int, folder: Path
) -> Judged:
    """Predictions of all images, to a file, and what they are worth."""
    features, labels = test
    with measured() as predict_cost:
        on_test = fitted.classifier.predict(features)
    on_train = fitted.classifier.predict(train)
    path = folder / f"predictions_{fitted.classifier.name}.csv"
    write_predictions(path, [(dataset.train, on_train), (dataset.test, on_test)], dataset.class_names)
    metrics = {
        "test": evaluate(labels, on_test, dataset.class_names, seed=seed),
        "train": evaluate(dataset.train.labels, on_train, dataset.class_names, seed=seed),
        "by_k": {k: float(np.mean(classes == labels)) for k, classes in sorted(on_test.by_k.items())},
    }
    return Judged(fitted, on_train, on_test, metrics, fit_cost, predict_cost)


def _few_shot(data: TrainingData, test: tuple, settings: Settings) -> dict[str, list[float]]:
    """Accuracies of several draws, by method."""
    features, labels = test
    found = few_shot(
        pick_tokens(data.features),
        data.labels,
        pick_tokens(features),
        labels,
        num_classes=data.num_classes,
        shots=settings.shots,
        seeds=range(settings.seed, settings.seed + _DRAWS),
    )
    return {method: np.asarray(accuracies).tolist() for method, accuracies in found.items()}
