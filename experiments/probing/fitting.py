"""How each classifier is fitted to features, and on which images its epoch, head or penalty is selected."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from dinojax.errors import UserError
from dinojax.probes import (
    EpochMetrics,
    LinearHead,
    fit_linear,
    fit_linear_sweep,
    fit_logistic,
    fit_logistic_grid,
    fit_mlp,
    fit_sgd_linear,
)
from dinojax.probes.labelled import check_classes, check_finite
from experiments.data.splits import Dataset
from experiments.features.parts import CLS, FeatureParts, concatenate
from experiments.probing.classifiers import Classifier
from experiments.probing.config import ClassifierSettings, ProbeSettings

HEADLINE_K = 20
OTHER_KS = (10, 100, 200)
EUCLIDEAN_K = 5
ON_HELDOUT = "selected on held-out training images"
NOTHING = "nothing to select"


def selected_on(evaluated: str) -> str:
    """What tables call a selection on the evaluated images, which are called "test" or "validation"."""
    return f"selected on the {evaluated} set"


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Everything that a fit may see.

    Attributes:
        features: of the training images.
        labels: their classes.
        num_classes: among which some may have no image.
        kept: indices of the images to learn from.
        heldout: indices of the others, to select on.
        part: of the features, the one that classifiers look at.
        views: features of augmented views of the same images, in the same order.
        heldout_features: of the held-out images, where they are prepared in another way than `features`.
        test: features and labels to select on instead of the held-out images, while all training images are learnt
            from. Only for the protocol "reported", whose numbers are optimistic.
        evaluated: what those images are called.
        mesh: the devices that share a sweep; None takes one.
    """

    features: FeatureParts
    labels: Int[np.ndarray, " images"]
    num_classes: int
    kept: Int[np.ndarray, " kept"]
    heldout: Int[np.ndarray, " heldout"]
    part: str = CLS
    views: Sequence[FeatureParts] = ()
    heldout_features: FeatureParts | None = None
    test: tuple[FeatureParts, np.ndarray] | None = None
    evaluated: str = "test"
    mesh: Mesh | None = None

    def to_learn(self, *, views: bool = False, everything: bool = False) -> tuple[FeatureParts, np.ndarray]:
        """Features and labels to learn from: of the kept images, or of all; followed by views of the same images."""
        rows = np.arange(len(self.labels)) if everything or self.test is not None else self.kept
        parts = [self.features, *self.views] if views else [self.features]
        return concatenate([part[rows] for part in parts]), np.tile(self.labels[rows], len(parts))

    def to_select(self) -> tuple[FeatureParts, np.ndarray]:
        """Features and labels to select an epoch, a head or a penalty on."""
        if self.test is not None:
            return self.test
        features = self.features[self.heldout] if self.heldout_features is None else self.heldout_features
        return features, self.labels[self.heldout]

    @property
    def selection(self) -> str:
        """What tables call the selection on those images."""
        return ON_HELDOUT if self.test is None else selected_on(self.evaluated)

    def classifier(self, name: str, arrays: Mapping[str, np.ndarray], **settings: Any) -> Classifier:
        """A classifier fitted to these data."""
        return Classifier(name, arrays, {"classes": self.num_classes, **settings}, self.part)


class Fit(NamedTuple):
    """A fitted classifier, the images it was selected on, and the selection as JSON: "curves" or "grid", the best."""

    classifier: Classifier
    selection: str
    details: dict[str, Any]


def check_labels(names: Sequence[str], dataset: Dataset, shots: int) -> None:
    """Raises a `UserError` for labels that the classifiers `names` cannot be fitted to or evaluated on."""
    counts, tests = (np.bincount(s.labels, minlength=len(dataset.class_names)) for s in (dataset.train, dataset.test))
    evaluated = dataset.test.name
    present = [name for name, count in zip(dataset.class_names, counts) if count]
    if len(counts) > len(dataset.class_names) or len(tests) > len(dataset.class_names):
        raise UserError(f"--data {dataset.name}: labels go beyond its {len(dataset.class_names)} classes")
    if len(present) < 2:
        raise UserError(f"--data {dataset.name}: all training images are of one class, {present[0]!r}; add others")
    if (unseen := np.flatnonzero((tests > 0) & (counts == 0))).size:
        name = dataset.class_names[unseen[0]]
        raise UserError(f"--data {dataset.name}: class {name!r} has {evaluated} images and no training image; add some")
    for name, k in (("knn", HEADLINE_K), ("knn5", EUCLIDEAN_K)):
        if name in names and sum(counts) < k:
            raise UserError(
                f"{name} needs at least k = {k} training images and there are {sum(counts)}; add images, raise "
                "--max-train or leave it out of --classifiers"
            )
    fewest = min(count for count in counts if count)
    if "few_shot" in names and fewest < shots:
        name = dataset.class_names[list(counts).index(fewest)]
        raise UserError(f"few_shot needs --shots {shots} training images of every class and {name!r} has {fewest}")
    if sum(counts) == len(present):
        raise UserError(
            f"--data {dataset.name}: one training image in each of {len(present)} classes leaves none to hold out; "
            "add images or raise --max-train"
        )


def fit(name: str, data: TrainingData, settings: ProbeSettings, seed: int) -> Fit:
    """Fits one of `TITLES`.

    Raises:
        UserError: features that are not finite, one class alone, or too few images.
    """
    check_classes(data.labels, data.num_classes)
    for array in data.features.arrays.values():
        check_finite(array)
    return _FITS[name](data, settings, seed)


def _fit_knn(data: TrainingData, settings: ProbeSettings, seed: int) -> Fit:
    smaller = [k for k in OTHER_KS if k <= len(data.labels)]
    return _fit_neighbours("knn", data, kind="knn", k=HEADLINE_K, other_ks=smaller, temperature=0.07)


def _fit_knn5(data: TrainingData, settings: ProbeSettings, seed: int) -> Fit:
    return _fit_neighbours("knn5", data, kind="euclidean", k=EUCLIDEAN_K)


def _fit_neighbours(name: str, data: TrainingData, **settings: Any) -> Fit:
    arrays = {"features": data.features.vectors(data.part), "labels": data.labels.astype(np.int64)}
    return Fit(data.classifier(name, arrays, **settings), NOTHING, {})


def _fit_linear(data: TrainingData, settings: ProbeSettings, seed: int) -> Fit:
    head, history, best = fit_linear(
        *_vectors(data, views=True),
        num_classes=data.num_classes,
        key=jax.random.key(seed),
        epochs=settings.epochs,
        batch_size=settings.probe_batch_size,
        learning_rate=settings.learning_rate,
    )
    return Fit(_linear("linear", head, data), data.selection, _by_epoch(history, best))


def _fit_mlp(
    name: str, data: TrainingData, settings: ClassifierSettings, seed: int, *, batch_size: int, shuffle: bool
) -> Fit:
    features, labels, *selected_on = _vectors(data, views=True)
    order = "new in every epoch" if shuffle else "of the files, the same in every epoch"
    if not shuffle and (np.diff(data.labels) >= 0).all():
        # Files sorted by class would give minibatches of one class; the notebooks' files are not sorted.
        random_order = np.random.default_rng(seed).permutation(len(labels))
        features, labels = features[random_order], labels[random_order]
        order = "random, the same in every epoch (the files are sorted by class)"
    head, history, best = fit_mlp(
        features,
        labels,
        *selected_on,
        num_classes=data.num_classes,
        key=jax.random.key(seed),
        epochs=settings.mlp_epochs,
        batch_size=batch_size,
        shuffle=shuffle,
    )
    classifier = data.classifier(name, _arrays(head), kind="mlp")
    details = {"batch_size": batch_size, "order": order, **_by_epoch(history, best)}
    return Fit(classifier, data.selection, details)


def _fit_sweep(data: TrainingData, settings: ProbeSettings, seed: int) -> Fit:
    (features, labels), (selected_on, selected_labels) = data.to_learn(views=True), data.to_select()
    options = {"num_classes": data.num_classes, "key": jax.random.key(seed), "steps": settings.sweep_steps}
    found = fit_linear_sweep(features.tokens, labels, selected_on.tokens, selected_labels, mesh=data.mesh, **options)
    chosen = found.settings[found.best]
    head = found.head
    if data.test is None:
        features, labels = data.to_learn(views=True, everything=True)
        inputs = features.vectors(blocks=chosen.blocks, mean_patch=chosen.mean_patch)
        head = fit_sgd_linear(inputs, labels, learning_rate=chosen.learning_rate, **options)
    grid = [{**s._asdict(), "accuracy": float(a)} for s, a in zip(found.settings, found.heldout_accuracy)]
    classifier = _linear("sweep", head, data, chosen.blocks, chosen.mean_patch)
    return Fit(classifier, data.selection, {"best": grid[found.best], "steps": settings.sweep_steps, "grid": grid})


def _fit_logistic(data: TrainingData, settings: ProbeSettings, seed: int) -> Fit:
    """Selects C on held-out images under every protocol, as the notebooks do, then fits to all training images."""
    honest = dataclasses.replace(data, test=None)
    found = fit_logistic_grid(*_vectors(honest), num_classes=data.num_classes)
    grid = [{"C": c, "accuracy": float(a)} for c, a in zip(found.Cs, found.heldout_accuracy)]
    head = fit_logistic(
        data.features.vectors(data.part),
        data.labels,
        num_classes=data.num_classes,
        C=found.Cs[found.best],
        warm_start=found.head,
    )
    return Fit(_linear("logistic", head, data), honest.selection, {"best": grid[found.best], "grid": grid})


def _fit_svc(data: TrainingData, settings: ClassifierSettings, seed: int) -> Fit:
    """scikit-learn's RBF SVC with its defaults, on all training images."""
    from sklearn.svm import SVC

    raw = data.features.vectors(data.part)
    mean, scale = np.zeros(raw.shape[1]), np.ones(raw.shape[1])
    if settings.svc_standardise:
        mean, deviation = raw.mean(axis=0, dtype=np.float64), raw.std(axis=0, dtype=np.float64)
        scale = np.where(deviation > 0, deviation, 1)
    inputs = (raw.astype(np.float64) - mean) / scale
    svc = SVC(kernel="rbf", gamma=scaled_gamma(inputs), cache_size=1000).fit(inputs, data.labels)
    arrays = {"support_vectors": raw[svc.support_], "mean": mean, "scale": scale, **svc_arrays(svc)}
    classifier = data.classifier("svc", arrays, kind="svc", gamma=svc.gamma)
    return Fit(classifier, NOTHING, {"support_vectors": len(svc.support_), "standardised": settings.svc_standardise})


def scaled_gamma(inputs: Float[np.ndarray, "images dim"]) -> float:
    """What scikit-learn's `gamma="scale"` stands for."""
    variance = inputs.var()
    return float(1 / (inputs.shape[1] * variance)) if variance else 1.0


def svc_arrays(svc: Any) -> dict[str, np.ndarray]:
    """What a fitted `sklearn.svm.SVC` has learnt, beside its support vectors."""
    # With two classes scikit-learn turns the signs of the public attributes, so that positive means the second.
    sign = -1 if len(svc.classes_) == 2 else 1
    return {
        "dual_coef": sign * svc.dual_coef_,
        "intercept": sign * svc.intercept_,
        "n_support": svc.n_support_.astype(np.int64),
        "classes": svc.classes_.astype(np.int64),
    }


def _vectors(data: TrainingData, *, views: bool = False) -> tuple[np.ndarray, ...]:
    """Vectors and labels to learn from, then those to select on."""
    (features, labels), (selected_on, selected_labels) = data.to_learn(views=views), data.to_select()
    return features.vectors(data.part), labels, selected_on.vectors(data.part), selected_labels


def _linear(name: str, head: LinearHead, data: TrainingData, blocks: int = 1, mean_patch: bool = False) -> Classifier:
    return data.classifier(name, _arrays(head), kind="linear", blocks=blocks, mean_patch=mean_patch)


def _arrays(head: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in head._asdict().items()}


def _by_epoch(history: EpochMetrics, best: int) -> dict[str, Any]:
    curves = {name: np.asarray(values).tolist() for name, values in history._asdict().items()}
    return {"best_epoch": best + 1, "epochs": len(curves["train_loss"]), "curves": curves}


_FITS: dict[str, Callable[[TrainingData, Any, int], Fit]] = {
    "knn": _fit_knn,
    "knn5": _fit_knn5,
    "linear": _fit_linear,
    "sweep": _fit_sweep,
    "logistic": _fit_logistic,
    "mlp": partial(_fit_mlp, "mlp", batch_size=64, shuffle=False),
    "mlp_shuffled": partial(_fit_mlp, "mlp_shuffled", batch_size=32, shuffle=True),
    "svc": _fit_svc,
}
