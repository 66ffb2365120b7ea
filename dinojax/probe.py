"""Classifiers on frozen features: weighted k-NN and the linear probe, with the splits they are chosen on.

Features are arrays "images dim" and labels class indices; where the features come from is no concern of this file.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

# Rows of training features on the device at once, and rows of test features compared with them at once: together they
# bound the memory (the largest array is their product) whatever the sizes of the sets.
_TRAIN_ROWS = 65_536
_TEST_ROWS = 256
_CONSTANT = 1e-6

Labels = Int[Array | np.ndarray, " images"]


class LinearHead(NamedTuple):
    """A linear classifier on raw features: logits = features @ kernel + bias."""

    kernel: Float[Array, "dim classes"]
    bias: Float[Array, " classes"]


class EpochMetrics(NamedTuple):
    """Loss (mean cross-entropy in nats) and accuracy (fraction) after each epoch, on both parts of the training set."""

    train_loss: Float[Array, " epochs"]
    train_accuracy: Float[Array, " epochs"]
    heldout_loss: Float[Array, " epochs"]
    heldout_accuracy: Float[Array, " epochs"]


def stratified_subset(labels: Labels, count: int, seed: int) -> Int[np.ndarray, " count"]:
    """Indices, ascending, of `count` images drawn from every class in proportion to its size.

    Every class gives at least one image, the common ones no more than one beyond their share.

    Raises:
        ValueError: fewer than one image a class, or more than there are.
    """
    labels = np.asarray(labels)
    classes, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if not len(classes) <= count <= len(labels):
        raise ValueError(f"count={count} is not between {len(classes)} (classes) and {len(labels)} (images)")
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(inverse[shuffled], kind="stable")]
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    share = rank_in_class / np.repeat(sizes, sizes)
    return np.sort(by_class[np.argsort(share, kind="stable")[:count]])


def split_heldout(
    labels: Labels, fraction: float, seed: int
) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " heldout"]]:
    """Indices to train on and indices held out to select on; stratified, and every class stays in training.

    Raises:
        ValueError: no image can be held out because every class has only one.
    """
    labels = np.asarray(labels)
    most = len(labels) - len(np.unique(labels))
    if most < 1:
        raise ValueError(f"{len(labels)} images with one a class leave none to hold out")
    heldout = min(max(1, round(fraction * len(labels))), most)
    kept = stratified_subset(labels, len(labels) - heldout, seed)
    return kept, np.setdiff1d(np.arange(len(labels)), kept)


def nearest_neighbours(
    train_features: Float[Array | np.ndarray, "train dim"],
    test_features: Float[Array | np.ndarray, "test dim"],
    k: int,
) -> tuple[Float[np.ndarray, "test k"], Int[np.ndarray, "test k"]]:
    """The `k` training images of highest cosine similarity for every test image, best first, ties by lower index.

    Training features pass through the device in chunks and are merged by a running top-k, so they may be larger than
    its memory (pass a numpy array or memory map).

    Returns:
        Cosine similarities and indices of training images.

    Raises:
        ValueError: `k` is not between 1 and the number of training images.
    """
    total, tests = len(train_features), len(test_features)
    if not 1 <= k <= total:
        raise ValueError(f"k={k} is not between 1 and the {total} training images")
    rows = -(-total // -(-total // _TRAIN_ROWS))
    queries = _normalise(jnp.asarray(test_features, jnp.float32))
    queries = jnp.pad(queries, ((0, -tests % _TEST_ROWS), (0, 0))).reshape(-1, _TEST_ROWS, queries.shape[1])
    best = jnp.full((*queries.shape[:2], k), -jnp.inf), jnp.zeros((*queries.shape[:2], k), jnp.int32)
    for start in range(0, total, rows):
        chunk = np.asarray(train_features[start : start + rows], np.float32)
        padded = np.pad(chunk, ((0, rows - len(chunk)), (0, 0)))
        best = _merge_neighbours(best, queries, padded, start, len(chunk))
    similarities, indices = (np.asarray(array).reshape(-1, k)[:tests] for array in best)
    return similarities, indices


def knn_votes(
    similarities: Float[np.ndarray, "test neighbours"],
    neighbour_labels: Int[np.ndarray, "test neighbours"],
    *,
    num_classes: int,
    k: int,
    temperature: float = 0.07,
) -> Float[np.ndarray, "test classes"]:
    """What the first `k` neighbours give each class: the sum of exp(similarity / temperature).

    Source: facebookresearch/dino 7c446df `eval_knn.py`, `knn_classifier`.
    """
    tests = len(similarities)
    weights = np.exp(similarities[:, :k].astype(np.float64) / temperature)
    cells = np.arange(tests)[:, None] * num_classes + neighbour_labels[:, :k]
    return np.bincount(cells.ravel(), weights.ravel(), minlength=tests * num_classes).reshape(tests, num_classes)


def knn_predict(
    train_features: Float[Array | np.ndarray, "train dim"],
    train_labels: Int[Array | np.ndarray, " train"],
    test_features: Float[Array | np.ndarray, "test dim"],
    *,
    num_classes: int,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, Int[np.ndarray, " test"]]:
    """DINO's weighted k-NN classifier for several `k` from one search; equal votes go to the lower class index.

    Returns:
        The predicted class of every test image, for each of `ks`.

    Raises:
        ValueError: a `k` that is not between 1 and the number of training images.
    """
    similarities, indices = nearest_neighbours(train_features, test_features, max(ks))
    labels = np.asarray(train_labels)[indices]
    votes = partial(knn_votes, similarities, labels, num_classes=num_classes, temperature=temperature)
    return {k: votes(k=k).argmax(axis=1) for k in ks}


def fit_linear(
    train_features: Float[Array | np.ndarray, "train dim"],
    train_labels: Int[Array | np.ndarray, " train"],
    heldout_features: Float[Array | np.ndarray, "heldout dim"],
    heldout_labels: Int[Array | np.ndarray, " heldout"],
    *,
    num_classes: int,
    key: Key[Array, ""],
    epochs: int = 5,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
) -> tuple[LinearHead, EpochMetrics, int]:
    """One linear layer, softmax cross-entropy and Adam with a cosine schedule; the epoch best on held-out images wins.

    The features are standardised with the mean and deviation of `train_features` while the layer learns; both are
    folded into the head that is returned, which takes raw features. Test images play no part. The order of images is
    drawn from `key` in every epoch; what is over after the last full minibatch waits for the next epoch.

    Returns:
        The head, the metrics of every epoch, and the index of the epoch that the head is from: the highest held-out
        accuracy, among equals the lowest held-out loss.
    """
    train = jnp.asarray(train_features, jnp.float32), jnp.asarray(train_labels)
    heldout = jnp.asarray(heldout_features, jnp.float32), jnp.asarray(heldout_labels)
    heads, metrics = _train_linear(
        train, heldout, key, num_classes, epochs, min(batch_size, len(train_labels)), learning_rate
    )
    best = int(np.lexsort((metrics.heldout_loss, -metrics.heldout_accuracy))[0])
    return LinearHead(heads.kernel[best], heads.bias[best]), metrics, best


def linear_logits(
    head: LinearHead, features: Float[Array | np.ndarray, "images dim"]
) -> Float[Array, "images classes"]:
    """Class scores before the softmax, in full float32 on every device."""
    return jnp.matmul(features, head.kernel, precision="highest") + head.bias


def _normalise(features: Array) -> Array:
    """Unit L2 norm; zero stays zero."""
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


@partial(jax.jit, donate_argnums=0)
def _merge_neighbours(best: tuple[Array, Array], queries: Array, chunk: Array, start: Array, valid: Array) -> tuple:
    """The running best of every query after one more chunk, of which only the first `valid` rows are images."""
    chunk = _normalise(chunk).T
    is_image = jnp.arange(chunk.shape[1]) < valid

    def merge(rows):
        similarities, indices, query = rows
        k = similarities.shape[1]
        found = jnp.where(is_image, jnp.matmul(query, chunk, precision="highest"), -jnp.inf)
        found, position = jax.lax.top_k(found, min(k, chunk.shape[1]))
        # Earlier chunks stand first, and top_k keeps the order of equals: ties go to the lower training index.
        similarities, choice = jax.lax.top_k(jnp.concatenate([similarities, found], axis=1), k)
        indices = jnp.concatenate([indices, position + start], axis=1)
        return similarities, jnp.take_along_axis(indices, choice, axis=1)

    return jax.lax.map(merge, (*best, queries))


@partial(jax.jit, static_argnames=("num_classes", "epochs", "batch_size"))
def _train_linear(train, heldout, key, num_classes, epochs, batch_size, learning_rate) -> tuple:
    """Heads on raw features and metrics, stacked over epochs."""
    features, labels = train
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    scale = jnp.where(deviation > _CONSTANT, 1 / deviation, 0)
    standardised = (features - mean) * scale
    steps = len(labels) // batch_size
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, epochs * steps))

    def step(carry, batch):
        head, opt_state = carry
        gradients = jax.grad(_cross_entropy)(head, standardised[batch], labels[batch])
        updates, opt_state = optimizer.update(gradients, opt_state)
        return (optax.apply_updates(head, updates), opt_state), None

    def epoch(carry, epoch_key):
        order = jax.random.permutation(epoch_key, len(labels))[: steps * batch_size]
        carry, _ = jax.lax.scan(step, carry, order.reshape(steps, batch_size))
        kernel, bias = carry[0]
        raw = LinearHead(kernel * scale[:, None], bias - jnp.matmul(mean * scale, kernel, precision="highest"))
        return carry, (raw, EpochMetrics(*_loss_and_accuracy(raw, *train), *_loss_and_accuracy(raw, *heldout)))

    head = LinearHead(jnp.zeros((features.shape[1], num_classes)), jnp.zeros(num_classes))
    return jax.lax.scan(epoch, (head, optimizer.init(head)), jax.random.split(key, epochs))[1]


def _cross_entropy(head: LinearHead, features: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(linear_logits(head, features), labels).mean()


def _loss_and_accuracy(head: LinearHead, features: Array, labels: Array) -> tuple[Array, Array]:
    hits = linear_logits(head, features).argmax(axis=1) == labels
    return _cross_entropy(head, features, labels), hits.mean()
