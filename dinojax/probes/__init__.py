"""Classifiers on frozen features: nearest neighbours, linear, MLP, logistic regression, few-shot.

Features are arrays "images dim", and labels are class indices. The features may come from any model.
"""

from dinojax.probes.few_shot import few_shot, few_shot_predictions
from dinojax.probes.labelled import few_shot_indices, split_heldout, stratified_subset
from dinojax.probes.linear import (
    EpochMetrics,
    LinearHead,
    MlpHead,
    fit_linear,
    fit_mlp,
    initial_mlp,
    linear_logits,
    mlp_logits,
)
from dinojax.probes.logistic import LOGISTIC_CS, LogisticGrid, fit_logistic, fit_logistic_grid
from dinojax.probes.neighbours import (
    euclidean_knn_predict,
    euclidean_neighbours,
    knn_predict,
    knn_votes,
    nearest_neighbours,
)
from dinojax.probes.sweep import (
    SWEEP_LEARNING_RATES,
    SweepResult,
    SweepSettings,
    fit_linear_sweep,
    fit_sgd_linear,
    sweep_inputs,
)

__all__ = [
    "LOGISTIC_CS",
    "SWEEP_LEARNING_RATES",
    "EpochMetrics",
    "LinearHead",
    "LogisticGrid",
    "MlpHead",
    "SweepResult",
    "SweepSettings",
    "euclidean_knn_predict",
    "euclidean_neighbours",
    "few_shot",
    "few_shot_indices",
    "few_shot_predictions",
    "fit_linear",
    "fit_linear_sweep",
    "fit_logistic",
    "fit_logistic_grid",
    "fit_mlp",
    "fit_sgd_linear",
    "initial_mlp",
    "knn_predict",
    "knn_votes",
    "linear_logits",
    "mlp_logits",
    "nearest_neighbours",
    "split_heldout",
    "stratified_subset",
    "sweep_inputs",
]
