"""Nearest neighbours among frozen features: DINO's weighted k-NN by cosine, and plain k-NN by Euclidean distance.

The training features go through the device in chunks with a running top-k, so they may be larger than its memory (pass
a numpy array or a memory map). On a mesh each device searches its share of a chunk, and their best are merged.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dinojax.errors import require
from dinojax.parallel import batch_sharding, by_share, joined, replicated, share_number
from dinojax.probes.labelled import check_classes, check_finite

# Rows of training features on the device, and rows of test features that are compared with them at once. The largest
# array is their product, so they bound the memory for sets of any size.
_TRAIN_ROWS = 65_536
_TEST_ROWS = 256
# Candidates beyond k that the device finds by rounded distances; exact distances choose k among all of them.
_SPARE = 16
_EXACT_ROWS = 1024


def nearest_neighbours(
    train_features: Float[Array | np.ndarray, "train dim"],
    test_features: Float[Array | np.ndarray, "test dim"],
    k: int,
    *,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[np.ndarray, "test k"], Int[np.ndarray, "test k"]]:
    """The `k` training images with the highest cosine similarity to each test image, best first, ties by lower index.

    Args:
        train_features: of any length.
        test_features: of any length.
        k: number of neighbours.
        chunk: most training images on a device at once. None takes 65,536.
        mesh: the devices; None takes one.

    Returns:
        Cosine similarities, and indices of training images.

    Raises:
        UserError: `k` is not between 1 and the number of training images, or a feature is not finite.
    """
    return _search(train_features, test_features, k, cosine=True, chunk=chunk, mesh=mesh)


def euclidean_neighbours(
    train_features: Float[Array | np.ndarray, "train dim"],
    test_features: Float[Array | np.ndarray, "test dim"],
    k: int,
    *,
    mesh: Mesh | None = None,
) -> tuple[Float[np.ndarray, "test k"], Int[np.ndarray, "test k"]]:
    """The `k` training images with the least Euclidean distance to each test image, nearest first, ties by lower index.

    The device finds a few more than `k` in float32; the result is selected by distances in float64.

    Returns:
        Distances, and indices of training images.

    Raises:
        UserError: `k` is not between 1 and the number of training images, or a feature is not finite.
    """
    _check_k(k, len(train_features))
    found = _search(train_features, test_features, min(k + _SPARE, len(train_features)), cosine=False, mesh=mesh)[1]
    candidates = np.sort(found, axis=1)
    distances = np.empty((len(test_features), k))
    indices = np.empty((len(test_features), k), candidates.dtype)
    train, test = np.asarray(train_features), np.asarray(test_features)
    for start in range(0, len(test), _EXACT_ROWS):
        rows = slice(start, start + _EXACT_ROWS)
        difference = train[candidates[rows]] - test[rows, None].astype(np.float64)
        squared = np.einsum("tcd,tcd->tc", difference, difference)
        order = np.argsort(squared, axis=1, kind="stable")[:, :k]
        distances[rows] = np.sqrt(np.take_along_axis(squared, order, axis=1))
        indices[rows] = np.take_along_axis(candidates[rows], order, axis=1)
    return distances, indices


def knn_votes(
    similarities: Float[np.ndarray, "test neighbours"],
    neighbour_labels: Int[np.ndarray, "test neighbours"],
    *,
    num_classes: int,
    k: int,
    temperature: float = 0.07,
) -> Float[np.ndarray, "test classes"]:
    """The votes of the first `k` neighbours for each class: the sum of exp(similarity / temperature).

    Source: facebookresearch/dino 7c446df `eval_knn.py`, `knn_classifier`.
    """
    return _count(neighbour_labels[:, :k], np.exp(similarities[:, :k].astype(np.float64) / temperature), num_classes)


def knn_predict(
    train_features: Float[Array | np.ndarray, "train dim"],
    train_labels: Int[Array | np.ndarray, " train"],
    test_features: Float[Array | np.ndarray, "test dim"],
    *,
    num_classes: int,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    mesh: Mesh | None = None,
) -> dict[int, Int[np.ndarray, " test"]]:
    """DINO's weighted k-NN classifier for several `k` from one search; ties go to the lower class index.

    Returns:
        k → predicted class of each test image.

    Raises:
        UserError: a `k` that is not between 1 and the number of training images, or labels or features that no
            classifier can use.
    """
    check_classes(train_labels, num_classes)
    _check_k(min(ks), len(train_features))
    similarities, indices = nearest_neighbours(train_features, test_features, max(ks), mesh=mesh)
    labels = np.asarray(train_labels)[indices]
    votes = partial(knn_votes, similarities, labels, num_classes=num_classes, temperature=temperature)
    return {k: votes(k=k).argmax(axis=1) for k in ks}


def euclidean_knn_predict(
    train_features: Float[Array | np.ndarray, "train dim"],
    train_labels: Int[Array | np.ndarray, " train"],
    test_features: Float[Array | np.ndarray, "test dim"],
    *,
    num_classes: int,
    k: int = 5,
) -> Int[np.ndarray, " test"]:
    """The majority class of the `k` nearest training images by Euclidean distance; ties go to the lower class index.

    Equal to scikit-learn's `KNeighborsClassifier(n_neighbors=k)`, except that here images at exactly the same distance
    are ordered by their index.

    Raises:
        UserError: a `k` that is not between 1 and the number of training images, or labels or features that no
            classifier can use.
    """
    check_classes(train_labels, num_classes)
    indices = euclidean_neighbours(train_features, test_features, k)[1]
    labels = np.asarray(train_labels)[indices]
    return _count(labels, np.ones(labels.shape), num_classes).argmax(axis=1)


def _count(labels: np.ndarray, weights: np.ndarray, num_classes: int) -> np.ndarray:
    """The sum of weights for each class, "test classes"."""
    tests = len(labels)
    cells = np.arange(tests)[:, None] * num_classes + labels
    return np.bincount(cells.ravel(), weights.ravel(), minlength=tests * num_classes).reshape(tests, num_classes)


def _check_k(k: int, total: int) -> None:
    require(1 <= k <= total, "k", k, f"between 1 and the {total} training images")


def _search(
    train_features, test_features, k: int, *, cosine: bool, chunk: int | None = None, mesh: Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Descending scores, and indices; the score is the cosine, or the product minus half the squared length."""
    total, tests = len(train_features), len(test_features)
    _check_k(k, total)
    check_finite(test_features)
    devices = 1 if mesh is None else mesh.size
    rows = -(-total // -(-total // ((chunk or _TRAIN_ROWS) * devices)))
    rows = -(-rows // devices) * devices
    queries = jnp.asarray(test_features, jnp.float32)
    # Moving both sets changes no distance, and near the origin less is lost to rounding.
    centre = np.asarray(train_features[:rows], np.float32).mean(axis=0)
    if cosine:
        centre = np.zeros_like(centre)
    queries = unit_length(queries) if cosine else queries - centre[None]
    together = min(_TEST_ROWS, tests)
    queries = jnp.pad(queries, ((0, -tests % together), (0, 0))).reshape(-1, together, queries.shape[1])
    best = jnp.full((*queries.shape[:2], k), -jnp.inf), jnp.zeros((*queries.shape[:2], k), jnp.int32)
    if mesh is not None and devices > 1:
        queries, best = jax.device_put((queries, best), replicated(mesh))
    for start in range(0, total, rows):
        part = np.asarray(train_features[start : start + rows], np.float32)
        check_finite(part)
        padded = np.pad(part - centre, ((0, rows - len(part)), (0, 0)))
        if mesh is not None and devices > 1:
            padded = jax.device_put(padded, batch_sharding(mesh))
        best = _merge_neighbours(best, queries, padded, start, len(part), cosine=cosine, mesh=mesh)
    scores, indices = (np.asarray(array).reshape(-1, k)[:tests] for array in best)
    return scores, indices


def unit_length(features: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Vectors of L2 norm 1; zero stays zero."""
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


@partial(jax.jit, donate_argnums=0, static_argnames=("cosine", "mesh"))
def _merge_neighbours(
    best: tuple, queries: Array, chunk: Array, start: Array, valid: Array, *, cosine: bool, mesh: Mesh | None
) -> tuple:
    """The best neighbours of each query after one more chunk, of which only the first `valid` rows are images."""
    if mesh is None or mesh.size == 1:
        return _merge_share(best, queries, chunk, start, valid, cosine=cosine, join=lambda found: found)

    def of_share(best: tuple, queries: Array, chunk: Array, start: Array, valid: Array) -> tuple:
        first = share_number() * len(chunk)
        join = partial(jax.tree.map, lambda found: joined(found, axis=1))
        return _merge_share(best, queries, chunk, start + first, valid - first, cosine=cosine, join=join)

    return by_share(of_share, mesh, (False, False, True, False, False))(best, queries, chunk, start, valid)


def _merge_share(
    best: tuple, queries: Array, chunk: Array, start: Array, valid: Array, *, cosine: bool, join: Callable
) -> tuple:
    """`_merge_neighbours` for the share of one device; `join` gives the candidates of all devices, in their order."""
    chunk = unit_length(chunk) if cosine else chunk
    handicap = jnp.zeros(len(chunk)) if cosine else -0.5 * jnp.sum(chunk**2, axis=1)
    handicap = jnp.where(jnp.arange(len(chunk)) < valid, handicap, -jnp.inf)
    chunk = chunk.T

    def merge(rows):
        scores, indices, query = rows
        k = scores.shape[1]
        found = jnp.matmul(query, chunk, precision="highest") + handicap[None]
        found, position = jax.lax.top_k(found, min(k, chunk.shape[1]))
        found, position = join((found, position + start))
        # Earlier chunks come first, and top_k keeps the order of equals, so ties go to the lower training index.
        scores, choice = jax.lax.top_k(jnp.concatenate([scores, found], axis=1), k)
        indices = jnp.concatenate([indices, position], axis=1)
        return scores, jnp.take_along_axis(indices, choice, axis=1)

    return jax.lax.map(merge, (*best, queries))
