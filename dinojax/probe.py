"""Classifiers on frozen features, all under one name: neighbours, linear, MLP, logistic regression, few-shot.

Features are arrays "images dim" and labels class indices; where the features come from is no concern of these files.
"""

from dinojax.few_shot import few_shot
from dinojax.labelled import few_shot_indices, split_heldout, stratified_subset
from dinojax.linear_probe import (
    EpochMetrics,
    LinearHead,
    MlpHead,
    fit_linear,
    fit_mlp,
    initial_mlp,
    linear_logits,
    mlp_logits,
)
from dinojax.linear_sweep import (
    SWEEP_LEARNING_RATES,
    SweepResult,
    SweepSettings,
    fit_linear_sweep,
    fit_sgd_linear,
    sweep_inputs,
)
from dinojax.logistic import LOGISTIC_CS, LogisticGrid, fit_logistic, fit_logistic_grid
from dinojax.neighbours import (
    euclidean_knn_predict,
    euclidean_neighbours,
    knn_predict,
    knn_votes,
    nearest_neighbours,
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
