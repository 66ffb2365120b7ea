"""Dense prediction from patch features: linear heads for segmentation and depth, tiles of large photos, scores.

A head is trained on frozen patches "batch rows columns width" and masks of any size. Its scores, one vector per patch,
are interpolated to pixels.
"""

from dinojax.dense.head import DenseHead, HeadParameters, Statistics, dense_scores, fold, initial_head, train_scores
from dinojax.dense.losses import VOID, bin_depth, depth_loss, segmentation_loss
from dinojax.dense.pixels import class_map, depth_map
from dinojax.dense.resize import bilinear_matrix, resize_bilinear
from dinojax.dense.scores import (
    DepthScores,
    SegmentationScores,
    class_counts,
    depth_scores,
    mean_iou_interval,
    segmentation_scores,
)
from dinojax.dense.tiles import Blend, tile_starts, tile_weights
from dinojax.dense.training import HeadState, head_optimizer, init_head_state, make_head_step

__all__ = [
    "VOID",
    "Blend",
    "DenseHead",
    "DepthScores",
    "HeadParameters",
    "HeadState",
    "SegmentationScores",
    "Statistics",
    "bilinear_matrix",
    "bin_depth",
    "class_counts",
    "class_map",
    "dense_scores",
    "depth_loss",
    "depth_map",
    "depth_scores",
    "fold",
    "head_optimizer",
    "init_head_state",
    "initial_head",
    "make_head_step",
    "mean_iou_interval",
    "resize_bilinear",
    "segmentation_loss",
    "segmentation_scores",
    "tile_starts",
    "tile_weights",
    "train_scores",
]
