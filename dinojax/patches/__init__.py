"""What patch features do without training: matching, label propagation, foreground, object discovery, anomaly maps.

Features of an image are arrays "rows columns dim", those of several images together "patches dim". They come from
`VisionTransformer.get_intermediate_layers(images, reshape=True)` or from any other model.
"""

from dinojax.patches.anomaly import anomaly_map, coreset, patch_distances
from dinojax.patches.discovery import Discovery, lost, token_cut
from dinojax.patches.foreground import fit_foreground, foreground_probability, patch_shares
from dinojax.patches.matching import Matches, mutual_matches, nearest_patches
from dinojax.patches.propagation import index_map, one_hot_labels, propagate_labels, propagate_video
from dinojax.patches.video_scores import VOID, VideoScores, boundary_measure, region_similarity, video_scores

__all__ = [
    "VOID",
    "Discovery",
    "Matches",
    "VideoScores",
    "anomaly_map",
    "boundary_measure",
    "coreset",
    "fit_foreground",
    "foreground_probability",
    "index_map",
    "lost",
    "mutual_matches",
    "nearest_patches",
    "one_hot_labels",
    "patch_distances",
    "patch_shares",
    "propagate_labels",
    "propagate_video",
    "region_similarity",
    "token_cut",
    "video_scores",
]
