"""Few-shot classification: accuracy with a few labelled images per class, over several random draws of them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int

from dinojax.errors import require
from dinojax.probes.labelled import few_shot_indices
from dinojax.probes.linear import linear_logits
from dinojax.probes.logistic import fit_logistic
from dinojax.probes.neighbours import knn_predict

FEW_SHOT_METHODS = ("1nn", "knn", "linear")


def few_shot(
    train_features: Float[Array | np.ndarray, "train dim"],
    train_labels: Int[Array | np.ndarray, " train"],
    test_features: Float[Array | np.ndarray, "test dim"],
    test_labels: Int[Array | np.ndarray, " test"],
    *,
    num_classes: int,
    shots: int = 5,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    methods: Sequence[str] = FEW_SHOT_METHODS,
) -> dict[str, Float[np.ndarray, " seeds"]]:
    """Accuracy of classifiers that learn from `shots` training images per class, drawn with each seed.

    "1nn" takes the class of the nearest image by cosine similarity, "knn" DINO's weighted vote of the `shots` nearest
    images, and "linear" is logistic regression with C = 1. None of them has a setting to select.

    Returns:
        Method → accuracy on all test images (a fraction) for each seed.

    Raises:
        UserError: an unknown method, a class with fewer images than `shots`, or features that are not finite.
    """
    predicted = few_shot_predictions(
        train_features,
        train_labels,
        test_features,
        num_classes=num_classes,
        shots=shots,
        seeds=seeds,
        methods=methods,
    )
    return {method: (classes == np.asarray(test_labels)[None]).mean(axis=1) for method, classes in predicted.items()}


def few_shot_predictions(
    train_features: Float[Array | np.ndarray, "train dim"],
    train_labels: Int[Array | np.ndarray, " train"],
    test_features: Float[Array | np.ndarray, "test dim"],
    *,
    num_classes: int,
    shots: int = 5,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    methods: Sequence[str] = FEW_SHOT_METHODS,
) -> dict[str, Int[np.ndarray, "seeds test"]]:
    """The classes that the classifiers of `few_shot` predict, by method.

    Raises:
        UserError: as in `few_shot`.
    """
    for method in methods:
        require(method in FEW_SHOT_METHODS, "method", method, f"one of {', '.join(FEW_SHOT_METHODS)}")
    classes: dict[str, list[np.ndarray]] = {method: [] for method in methods}
    for seed in seeds:
        chosen = few_shot_indices(train_labels, shots, seed)
        train = np.asarray(train_features)[chosen], np.asarray(train_labels)[chosen]
        predicted = _predict(train, test_features, methods, num_classes=num_classes, shots=shots)
        for method in methods:
            classes[method].append(np.asarray(predicted[method]))
    return {method: np.stack(rows) for method, rows in classes.items()}


def _predict(train: tuple, test_features, methods: Sequence[str], *, num_classes: int, shots: int) -> dict:
    """Method → predicted classes; both neighbour methods share one search."""
    features, labels = train
    ks = {"1nn": 1, "knn": shots}
    wanted = [ks[method] for method in methods if method in ks]
    predicted = {}
    if wanted:
        by_k = knn_predict(features, labels, test_features, num_classes=num_classes, ks=wanted)
        predicted = {method: by_k[ks[method]] for method in methods if method in ks}
    if "linear" in methods:
        head = fit_logistic(features, labels, num_classes=num_classes, C=1.0)
        predicted["linear"] = np.asarray(linear_logits(head, test_features)).argmax(axis=1)
    return predicted
