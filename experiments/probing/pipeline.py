"""From the features of one network to the accuracies of every classifier.

All classifiers are fitted, and whatever has to be selected is selected, on training images. Only then are the test
images opened, once. The protocol "reported" alone opens them before, and its numbers are marked.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dinojax.parallel import make_mesh
from dinojax.probes import few_shot_predictions
from experiments.data.splits import Dataset
from experiments.features.extractor import FeatureExtractor
from experiments.features.parts import CLS, PIXELS, FeatureParts
from experiments.features.raw_pixels import RawPixels
from experiments.probing.classifiers import Prediction
from experiments.probing.config import REPORTED, EvaluationConfig
from experiments.probing.data import Fold, SealedTest, TrainingFeatures, UnseenFeatures, extract, make_fold
from experiments.probing.fitting import Fit, TrainingData, fit
from experiments.probing.metrics import balanced_accuracy
from experiments.runs.measure import Cost, measured

CHOSEN = "chosen"
CROPS, FEW_SHOT, SWEEP = "crops", "few_shot", "sweep"
ON_CROPS = ("knn5_crops", "linear_crops")
_NEIGHBOURS = ("knn", "knn5", "knn5_crops")


@dataclasses.dataclass(frozen=True)
class Row:
    """The accuracy of one probe on one part of one network's features.

    Attributes:
        network: "teacher", "student", "untrained", "pixels", or "model" where there is only one.
        features: "cls", "mean_patch", "pixels", or "chosen" where the probe chooses among the first two.
        probe: such as "knn_20"; see `report.probe_title`.
        accuracies: fractions of the test images; one for each fold or draw.
        balanced_accuracies: means over the classes, in the same order.
        interval: 95 % over the test images (Wilson), of a single accuracy.
        train_accuracy: of the images that the classifier was fitted to; the mean over the folds.
        details: of the first fold: what was selected, on which images, and curves.
    """

    network: str
    features: str
    probe: str
    accuracies: tuple[float, ...]
    balanced_accuracies: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None
    train_accuracy: float | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """The mean."""
        return float(np.mean(self.accuracies))

    @property
    def balanced(self) -> "Row":
        """The same row with the balanced accuracy for the accuracy; without the interval and the training images."""
        return dataclasses.replace(self, accuracies=self.balanced_accuracies, interval=None, train_accuracy=None)

    @property
    def deviation(self) -> float | None:
        """The standard deviation over folds or draws, where there are several."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else None

    def as_json(self) -> dict[str, Any]:
        """For `result.json`."""
        numbers = {"accuracy": self.accuracy, "deviation": self.deviation, "balanced_accuracy": self.balanced.accuracy}
        return {**dataclasses.asdict(self), **numbers}


class EvaluatedProbe(NamedTuple):
    """A probe of one part of the features: its fits and predictions by fold, and their cost in the first fold.

    The training images are predicted only where it is needed.
    """

    probe: str
    part: str
    fits: list[Fit]
    fit_cost: Cost
    test: Sequence[Prediction] = ()
    train: Sequence[Prediction] = ()
    predict_cost: Cost | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What came out for one network.

    Attributes:
        network: its name.
        rows: the accuracies.
        probes: fitted classifiers and their predictions.
        test_features: of the test images.
        seconds: for the features and for the classifiers.
    """

    network: str
    rows: Sequence[Row]
    probes: Sequence[EvaluatedProbe]
    test_features: FeatureParts
    seconds: Mapping[str, float]


class Pipeline:
    """Fits all classifiers to the features of a network, without the test images, and then evaluates them on those.

    Args:
        config: of the evaluation.
        dataset: images and labels.
        folds: the official ones; None is one fold of all training images.
    """

    def __init__(self, config: EvaluationConfig, dataset: Dataset, folds: Sequence[Fold] | None = None):
        self.config, self.dataset = config, dataset
        self.folds = folds or [make_fold(dataset.train.labels, config)]
        self._settings, self._seed = config.probes, config.run.seed
        self._classes = len(dataset.class_names)
        self._mesh = make_mesh(config.model.mesh)

    def evaluate_network(self, network: str, source: FeatureExtractor | RawPixels) -> Evaluation:
        """Computes the features of a network and evaluates them."""
        started = time.perf_counter()
        training, sealed = extract(self.config, source, self.dataset, self.folds)
        extracted = time.perf_counter()
        rows, probes, unseen = self.evaluate_features(network, training, sealed)
        seconds = {"features": extracted - started, "classifiers": time.perf_counter() - extracted}
        return Evaluation(network, rows, probes, unseen.plain, seconds)

    def evaluate_features(
        self, network: str, training: TrainingFeatures, sealed: SealedTest
    ) -> tuple[list[Row], list[EvaluatedProbe], UnseenFeatures]:
        """The rows, the probes, and the test images that were opened."""
        parts = [PIXELS] if training.plain.pixels is not None else self._settings.parts
        early = sealed.open() if self._settings.protocol == REPORTED else None
        fitted = self._fit_all(network, parts, training, early)
        unseen = early or sealed.open()
        probes = [self._predict(one, training, unseen) for one in fitted]
        rows = [row for one in probes for row in self._rows(network, one, unseen.labels)]
        if FEW_SHOT in self._settings.names:
            rows += [row for part in parts for row in self._few_shot(network, part, training, unseen)]
        return rows, probes, unseen

    def _fit_all(
        self, network: str, parts: Sequence[str], training: TrainingFeatures, test: UnseenFeatures | None
    ) -> list[EvaluatedProbe]:
        """The fits of all folds by probe and part."""
        found: dict[tuple[str, str], EvaluatedProbe] = {}
        with tqdm(desc=f"fitting {network}", unit="classifier", dynamic_ncols=True) as bar:
            for fold, part in itertools.product(self.folds, parts):
                for probe, name, data in self._training_data(fold, part, training, test):
                    bar.set_postfix_str(f"{part} {probe}")
                    with measured() as cost:
                        one = fit(name, data, self._settings, self._seed)
                    found.setdefault((probe, part), EvaluatedProbe(probe, part, [], cost)).fits.append(one)
                    bar.update()
        return list(found.values())

    def _training_data(
        self, fold: Fold, part: str, training: TrainingFeatures, test: UnseenFeatures | None
    ) -> Iterator[tuple[str, str, TrainingData]]:
        """Probe, classifier, and what it is fitted to, for one part of the features in one fold."""
        rows = fold.rows
        data = TrainingData(
            _of(training.plain, rows),
            self.dataset.train.labels[rows],
            self._classes,
            *(np.searchsorted(rows, images) for images in fold),
            part=part,
            views=[_of(view, rows) for view in training.views],
            test=(test.plain, test.labels) if test else None,
            evaluated=self.dataset.test.name,
            mesh=self._mesh,
        )
        for name in self._settings.names:
            if name == CROPS:
                data_of_crops = dataclasses.replace(data, features=_of(training.crops, rows))
                yield "knn5_crops", "knn5", data_of_crops
                # The epoch is selected on images that are prepared like the test images.
                framed = training.framed_of(fold.heldout)
                yield "linear_crops", "linear", dataclasses.replace(data_of_crops, heldout_features=framed)
            elif name == SWEEP:  # chooses among the parts by itself
                if part == CLS and data.features.cls.shape[1] >= self._settings.fewest_sweep_blocks:
                    yield SWEEP, SWEEP, data
            elif name != FEW_SHOT:
                yield name, name, data

    def _predict(self, fitted: EvaluatedProbe, training: TrainingFeatures, unseen: UnseenFeatures) -> EvaluatedProbe:
        classifiers = [one.classifier for one in fitted.fits]
        features = unseen.framed if fitted.probe in ON_CROPS else unseen.plain
        with measured() as cost:
            test = [classifier.predict(features, self._mesh) for classifier in classifiers]
        train = []
        if self._settings.predict_training_images or fitted.probe == SWEEP:
            train = [
                classifier.predict(_of(training.plain, fold.rows), self._mesh)
                for classifier, fold in zip(classifiers, self.folds)
            ]
        return fitted._replace(test=test, train=train, predict_cost=cost)

    def _rows(self, network: str, evaluated: EvaluatedProbe, labels: np.ndarray) -> Iterator[Row]:
        """One row, or one for each k of the weighted k-NN."""
        probe, part, fits, *_ = evaluated
        details = {"selection": fits[0].selection, **fits[0].details}
        trained = self._train_accuracy(evaluated)
        classes = {probe: [one.classes for one in evaluated.test]}
        if probe == "knn":
            classes = {f"knn_{k}": [one.by_k[k] for one in evaluated.test] for k in sorted(evaluated.test[0].by_k)}
        for name, predicted in classes.items():
            hits = [int(np.sum(one == labels)) for one in predicted]
            accuracies = tuple(hit / len(labels) for hit in hits)
            balanced = tuple(balanced_accuracy(labels, one) for one in predicted)
            interval = _wilson(hits[0], len(labels)) if len(hits) == 1 else None
            shown = CHOSEN if probe == SWEEP else part
            yield Row(network, shown, name, accuracies, balanced, interval, trained, details)

    def _train_accuracy(self, evaluated: EvaluatedProbe) -> float | None:
        """Of the images that a classifier was fitted to; among neighbours, every image would find itself."""
        fits = evaluated.fits
        if evaluated.probe in _NEIGHBOURS:
            return None
        if "curves" in fits[0].details:
            curves = [(one.details["curves"]["train_accuracy"], one.details["best_epoch"]) for one in fits]
            return float(np.mean([accuracies[best - 1] for accuracies, best in curves]))
        labels = [self.dataset.train.labels[fold.rows] for fold in self.folds]
        return float(np.mean([np.mean(one.classes == true) for one, true in zip(evaluated.train, labels)]))

    def _few_shot(self, network: str, part: str, training: TrainingFeatures, unseen: UnseenFeatures) -> Iterator[Row]:
        """Accuracies over several draws; none of the methods has anything to select."""
        settings = self._settings
        found = few_shot_predictions(
            training.plain.vectors(part),
            self.dataset.train.labels,
            unseen.plain.vectors(part),
            num_classes=self._classes,
            shots=settings.shots,
            seeds=range(self._seed, self._seed + settings.draws),
        )
        labels = unseen.labels
        for method, draws in found.items():
            accuracies = tuple(float(np.mean(classes == labels)) for classes in draws)
            balanced = tuple(balanced_accuracy(labels, classes) for classes in draws)
            yield Row(network, part, f"{settings.shots}_shot_{method}", accuracies, balanced)


def _of(features: FeatureParts, rows: np.ndarray) -> FeatureParts:
    """The features of some images, without a copy where these are all."""
    return features if len(rows) == len(features) else features[rows]


def _wilson(hits: int, images: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    low, high = binomtest(hits, images).proportion_ci(method="wilson")
    return float(low), float(high)
