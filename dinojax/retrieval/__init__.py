"""Retrieval with frozen features: exact search, near-duplicates, DINO's protocols of retrieval and copy detection.

Features are arrays "images dim". They may come from any model.
"""

from dinojax.retrieval.copies import Whitening, copy_features, fit_whitening, gem, whiten
from dinojax.retrieval.groups import Groups, similar_groups
from dinojax.retrieval.scores import (
    RetrievalScores,
    average_precision,
    precision_at,
    retrieval_scores,
    revisited_relevance,
)
from dinojax.retrieval.search import nearest

__all__ = [
    "Groups",
    "RetrievalScores",
    "Whitening",
    "average_precision",
    "copy_features",
    "fit_whitening",
    "gem",
    "nearest",
    "precision_at",
    "retrieval_scores",
    "revisited_relevance",
    "similar_groups",
    "whiten",
]
