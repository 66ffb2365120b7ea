"""Clusters of features by scikit-learn, and the number of clusters by silhouette."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from dinojax.errors import UserError

Method = Literal["kmeans", "agglomerative"]
SAMPLE = 2000  # images that the number of clusters is selected on
MOST_AGGLOMERATIVE = 20_000  # images: the distances of all pairs take 1.6 GB
_STARTS = 4  # of k-means, of which the best counts


@dataclasses.dataclass(frozen=True)
class Clusters:
    """Clusters, the largest first.

    Attributes:
        labels: cluster of each image.
        similarity: cosine similarity of each image to the mean direction of its cluster.
        silhouettes: number of clusters → mean silhouette, where the number was selected.
    """

    labels: Int[np.ndarray, " images"]
    similarity: Float[np.ndarray, " images"]
    silhouettes: Mapping[int, float]

    @property
    def sizes(self) -> Int[np.ndarray, " clusters"]:
        """Images of each cluster."""
        return np.bincount(self.labels)

    def members(self, cluster: int) -> list[int]:
        """The images of a cluster, the most typical first; ties go to the lower index."""
        images = np.flatnonzero(self.labels == cluster)
        return images[np.argsort(-self.similarity[images], kind="stable")].tolist()


def find_clusters(
    unit: Float[np.ndarray, "images dim"], k: int | None, *, most: int, method: Method, seed: int
) -> Clusters:
    """Clusters of features of length 1; the same seed gives the same clusters.

    Args:
        unit: features at length 1.
        k: number of clusters. None selects the one of 2 … `most` with the largest mean silhouette (cosine), on at most
            2,000 images that are drawn with the seed; ties go to the smaller number.
        most: largest number to try.
        method: k-means with the best of 4 starts, or agglomerative clustering with Ward's linkage.
        seed: of the draws.

    Raises:
        UserError: there are too few images, or too few that differ; or too many for the method.
    """
    if method == "agglomerative" and len(unit) > MOST_AGGLOMERATIVE:
        raise UserError(
            f"--method agglomerative compares all pairs of {len(unit):,} images, which takes too much memory above "
            f"{MOST_AGGLOMERATIVE:,}; take kmeans"
        )
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # several threads add up in an order of their own
        silhouettes = {} if k else _silhouettes(unit, most, method, seed)
        chosen = k or max(silhouettes, key=lambda count: (silhouettes[count], -count))
        labels = _fit(unit, chosen, method, seed)
    labels = _largest_first(labels)
    if (found := labels.max() + 1) < chosen:
        raise UserError(f"--k {chosen} is more than the {found} images that differ; take a smaller number")
    centres = np.stack([unit[labels == cluster].mean(axis=0) for cluster in range(chosen)])
    centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    return Clusters(labels, np.einsum("id,id->i", unit, centres[labels]), silhouettes)


def _silhouettes(unit: np.ndarray, most: int, method: Method, seed: int) -> dict[int, float]:
    """Number of clusters → mean silhouette on a sample."""
    from sklearn.metrics import silhouette_score
    from tqdm import tqdm

    rng = np.random.default_rng(seed)
    sample = unit if len(unit) <= SAMPLE else unit[np.sort(rng.choice(len(unit), SAMPLE, replace=False))]
    found = {}
    for k in tqdm(range(2, min(most, len(sample) - 1) + 1), desc="numbers of clusters", dynamic_ncols=True, delay=1):
        labels = _fit(sample, k, method, seed)
        if len(np.unique(labels)) == k:
            found[k] = float(silhouette_score(sample, labels, metric="cosine"))
    if not found:
        raise UserError("--k auto needs three images or more, two of which differ; name a number with --k")
    return found


def _fit(unit: np.ndarray, k: int, method: Method, seed: int) -> np.ndarray:
    from sklearn.cluster import AgglomerativeClustering, KMeans
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(k, n_init=_STARTS, random_state=seed) if method == "kmeans" else AgglomerativeClustering(k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer images differ than k, which the callers look at
        return model.fit_predict(unit)


def _largest_first(labels: np.ndarray) -> np.ndarray:
    """The same clusters, numbered by size; ties go to the one with the earlier first image."""
    values, first, inverse, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    number = np.empty(len(values), np.int64)
    number[order] = np.arange(len(values))
    return number[inverse]
