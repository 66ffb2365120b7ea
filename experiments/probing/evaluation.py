"""Frozen features judged in the usual ways: k-NN, linear probes, few shots; all networks of a run, CLS and mean patch.

For each network the features of all images are computed once and cached; everything is fitted, and what has to be
chosen is chosen, on training images; only then are the test images judged, once.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from dinojax.probes import few_shot, split_heldout
from experiments.data.splits import Dataset
from experiments.data.squares import centre_cropped
from experiments.data.views import augmented
from experiments.features.extractor import LAST_BLOCKS, MEAN_PATCH, FeatureExtractor
from experiments.features.raw_pixels import RawPixels
from experiments.probing.classifiers import Features, Prediction, pick_tokens
from experiments.probing.evaluation_config import EvaluationConfig
from experiments.probing.fitting import Fit, Settings, TrainingData, fit

CLS, MEAN, PIXELS, CHOSEN = "cls", "mean_patch", "pixels", "chosen"
UNTRAINED, OTHER = "untrained", "model"
FRAME = 8  # px by which the notebooks' validation transform resizes beyond the square it cuts out
CROPS = ("linear_crops", "knn5_crops")


class Fold(NamedTuple):
    """Training images to learn from and others to choose on, by their indices."""

    kept: Int[np.ndarray, " kept"]
    heldout: Int[np.ndarray, " heldout"]


@dataclasses.dataclass(frozen=True)
class Row:
    """What one probe of one kind of features of one network is worth.

    Attributes:
        network: "teacher", "student", "untrained", "pixels", or "model" where there is only one.
        features: "cls", "mean_patch", "pixels", or "chosen" where the probe chooses among the first two.
        probe: such as "knn_20"; see `evaluation_report.probe_title`.
        accuracies: fractions of the test images; one for each fold or draw.
        interval: of a single accuracy, 95 % over test images (Wilson).
        train_accuracy: of what the classifier learnt from; the mean over the folds.
        details: of the first fold: what was chosen, on which images, and curves.
    """

    network: str
    features: str
    probe: str
    accuracies: tuple[float, ...]
    interval: tuple[float, float] | None = None
    train_accuracy: float | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """The mean."""
        return float(np.mean(self.accuracies))

    @property
    def deviation(self) -> float | None:
        """The standard deviation of a fold or draw, where there are several."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else None

    def as_json(self) -> dict[str, Any]:
        """For `result.json`."""
        return {**dataclasses.asdict(self), "accuracy": self.accuracy, "deviation": self.deviation}


class Learning(NamedTuple):
    """Features of the training images: all that a fit sees.

    Attributes:
        plain: as they are evaluated.
        crops: of one random crop of each.
        framed: of the held-out ones among them, resized to a little more than is cut out; others are not set.
    """

    plain: Features
    crops: Features
    framed: Features


class Test(NamedTuple):
    """Features of the test images, as they are evaluated and for what learnt from crops."""

    plain: Features
    framed: Features


def make_fold(labels: Int[np.ndarray, " images"], config: EvaluationConfig, rows: np.ndarray | None = None) -> Fold:
    """All training images, or those in `rows`, with the share that is held out."""
    rows = np.arange(len(labels)) if rows is None else rows
    return Fold(*(rows[part] for part in split_heldout(labels[rows], config.heldout_fraction, config.seed)))


def extract(
    config: EvaluationConfig, extractor: FeatureExtractor | RawPixels, dataset: Dataset, folds: Sequence[Fold]
) -> tuple[Learning, Test]:
    """All features that the classifiers asked for need, from the cache where they are; empty what they do not."""
    size, train, test = extractor.image_size, dataset.train, dataset.test
    resize = config.resize or size
    splits = [split if resize == size else centre_cropped(split, resize, size) for split in (train, test)]
    if "crops" not in config.names:
        plain, plain_test = extractor.extract(splits)
        return Learning(plain, plain[:0], plain[:0]), Test(plain_test, plain[:0])
    heldout = np.unique(np.concatenate([fold.heldout for fold in folds]))
    framed = [centre_cropped(split, size + FRAME, size) for split in (train.subset(heldout), test)]
    found = extractor.extract([*splits, augmented(train, 0, size), *framed])
    plain, plain_test, crops, framed_heldout, framed_test = found
    framed_train = np.full_like(crops, np.nan)
    framed_train[heldout] = framed_heldout
    return Learning(plain, crops, framed_train), Test(plain_test, framed_test)


def judge_network(
    network: str,
    config: EvaluationConfig,
    learning: Learning,
    test: Test,
    dataset: Dataset,
    folds: Sequence[Fold],
    blocks: int,
) -> Iterator[Row]:
    """Fits everything to every fold, without the test images, and then judges it on them.

    Args:
        network: its name.
        config: of the evaluation.
        learning: the network's features of the training images.
        test: and of the test images.
        dataset: their labels.
        folds: one, or the official ones.
        blocks: of the model; 0 for raw pixels.
    """
    kinds = (CLS, MEAN) if blocks else (PIXELS,)
    names = [name for name in config.names if name != "sweep" or blocks >= LAST_BLOCKS]
    labels = dataset.test.labels
    for (kind, probe), fits in _fit_all(network, kinds, names, config, learning, dataset, folds).items():
        features = _seen(test.framed if probe in CROPS else test.plain, kind)
        said = [fitted.classifier.predict(features) for fitted in fits]
        trained = _train_accuracy(probe, fits, folds, learning.plain, dataset.train.labels)
        details = {"selection": fits[0].selection, **fits[0].details}
        for name, predicted in _by_k(probe, said).items():
            hits = [int(np.sum(classes == labels)) for classes in predicted]
            interval = _wilson(hits[0], len(labels)) if len(hits) == 1 else None
            yield Row(network, kind, name, tuple(hit / len(labels) for hit in hits), interval, trained, details)
    if "few_shot" in names:
        for kind in kinds:
            yield from _few_shot(network, kind, config, learning, test, dataset)


def _fit_all(
    network: str,
    kinds: Sequence[str],
    names: Sequence[str],
    config: EvaluationConfig,
    learning: Learning,
    dataset: Dataset,
    folds: Sequence[Fold],
) -> dict[tuple[str, str], list[Fit]]:
    """The fits of all folds by features and probe."""
    shared = {field.name for field in dataclasses.fields(Settings)} & vars(config).keys()
    settings = Settings(**{name: getattr(config, name) for name in shared})
    each = {"knn": len(kinds), "knn5": len(kinds), "sweep": 1, "crops": 2 * len(kinds), "few_shot": 0}
    total = len(folds) * sum(each[name] for name in names)
    fits: dict[tuple[str, str], list[Fit]] = {}
    with tqdm(total=total, desc=f"fitting {network}", unit="classifier", dynamic_ncols=True, disable=not total) as bar:
        for fold, kind in itertools.product(folds, kinds):
            for probe, fitted in _fit(names, kind, learning, dataset, fold, settings):
                fits.setdefault((CHOSEN if probe == "sweep" else kind, probe), []).append(fitted)
                bar.update()
    return fits


def _seen(features: Features, kind: str) -> Float[np.ndarray, "images seen dim"]:
    """The features with what a classifier looks at in the place of the last CLS token; all of them for a choice."""
    return features[:, [MEAN_PATCH, MEAN_PATCH]] if kind == MEAN else features


def _fit(
    names: Sequence[str], kind: str, learning: Learning, dataset: Dataset, fold: Fold, settings: Settings
) -> Iterator[tuple[str, Fit]]:
    """The classifiers of one fold and one kind of features, by the names of their probes."""
    rows = np.sort(np.concatenate(fold))
    places = [np.searchsorted(rows, part) for part in fold]
    classes, labels = len(dataset.class_names), dataset.train.labels[rows]
    plain = TrainingData(_seen(learning.plain[rows], kind), labels, classes, *places)
    for name in ("knn", "knn5"):
        if name in names:
            yield name, fit(name, plain, settings)
    if "sweep" in names and kind == CLS:
        yield "sweep", fit("sweep", plain, settings)
    if "crops" in names:
        crops = dataclasses.replace(plain, features=_seen(learning.crops[rows], kind))
        yield "knn5_crops", fit("knn5", crops, settings)
        # What the epoch is chosen on looks as the test images do.
        mixed = crops.features.copy()
        mixed[places[1]] = _seen(learning.framed[fold.heldout], kind)
        yield "linear_crops", fit("linear", dataclasses.replace(crops, features=mixed), settings)


def _by_k(probe: str, said: Sequence[Prediction]) -> dict[str, list[np.ndarray]]:
    """The predicted classes of every fold; of the weighted k-NN for every k."""
    if probe != "knn":
        return {probe: [one.classes for one in said]}
    return {f"knn_{k}": [one.by_k[k] for one in said] for k in sorted(said[0].by_k)}


def _train_accuracy(
    probe: str, fits: Sequence[Fit], folds: Sequence[Fold], train: Features, labels: np.ndarray
) -> float | None:
    """Of linear heads, on what they learnt from; among neighbours every image would find itself."""
    if probe == "linear_crops":
        return float(np.mean([fit.details["curves"]["train_accuracy"][fit.details["best_epoch"] - 1] for fit in fits]))
    if probe != "sweep":
        return None
    rows = [np.concatenate(fold) for fold in folds]
    return float(
        np.mean([np.mean(fit.classifier.predict(train[r]).classes == labels[r]) for fit, r in zip(fits, rows)])
    )


def _few_shot(
    network: str, kind: str, config: EvaluationConfig, learning: Learning, test: Test, dataset: Dataset
) -> Iterator[Row]:
    """None of its methods has anything to choose."""
    found = few_shot(
        pick_tokens(_seen(learning.plain, kind)),
        dataset.train.labels,
        pick_tokens(_seen(test.plain, kind)),
        dataset.test.labels,
        num_classes=len(dataset.class_names),
        shots=config.shots,
        seeds=range(config.seed, config.seed + config.draws),
    )
    for method, accuracies in found.items():
        yield Row(network, kind, f"{config.shots}_shot_{method}", tuple(map(float, accuracies)))


def _wilson(hits: int, images: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    low, high = binomtest(hits, images).proportion_ci(method="wilson")
    return float(low), float(high)
