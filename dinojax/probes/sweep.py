"""DINOv2's linear evaluation: many linear classifiers are trained at once, and held-out images select one.

Source of the protocol: facebookresearch/dinov2 `dinov2/eval/linear.py`, which selects on the test set instead.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from dinojax.errors import require
from dinojax.parallel import batch_sharding, divide, on_mesh, replicated
from dinojax.probes.labelled import check_finite, check_labelled, check_range
from dinojax.probes.linear import LinearHead, cross_entropy, minibatches

# For batches of 256 images; the rate is proportional to the batch size.
SWEEP_LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
_MOMENTUM = 0.9
_INITIAL_DEVIATION = 0.01
_ROWS = 1024

BlockFeatures = Float[Array | np.ndarray, "images features dim"]


class SweepSettings(NamedTuple):
    """The settings of one classifier of the sweep.

    Attributes:
        learning_rate: learning rate for batches of 256 images.
        blocks: number of last blocks whose CLS token is an input.
        mean_patch: whether the mean patch token of the last block is an input too.
    """

    learning_rate: float
    blocks: int
    mean_patch: bool


class SweepResult(NamedTuple):
    """The classifiers of a sweep; the best has the highest held-out accuracy, then the lowest held-out loss.

    Attributes:
        settings: settings of each classifier.
        heldout_accuracy: accuracy of each on held-out images, a fraction.
        heldout_loss: mean cross-entropy of each on held-out images, in nats.
        best: index of the best classifier.
        head: the best classifier; it takes `sweep_inputs(features, settings[best])`.
    """

    settings: tuple[SweepSettings, ...]
    heldout_accuracy: Float[np.ndarray, " heads"]
    heldout_loss: Float[np.ndarray, " heads"]
    best: int
    head: LinearHead


def sweep_inputs(features: BlockFeatures, settings: SweepSettings) -> Float[Array | np.ndarray, "images width"]:
    """The input of one classifier of the sweep: the CLS tokens of its blocks, earlier first, then the mean patch."""
    start, stop = _columns(features.shape[1:], settings.blocks, settings.mean_patch)
    return features.reshape(len(features), -1)[:, start:stop]


def fit_linear_sweep(
    train_features: Float[Array | np.ndarray, "train features dim"],
    train_labels: Int[Array | np.ndarray, " train"],
    heldout_features: Float[Array | np.ndarray, "heldout features dim"],
    heldout_labels: Int[Array | np.ndarray, " heldout"],
    *,
    num_classes: int,
    key: Key[Array, ""],
    learning_rates: Sequence[float] = SWEEP_LEARNING_RATES,
    steps: int = 12_500,
    batch_size: int = 128,
    mesh: Mesh | None = None,
) -> SweepResult:
    """Trains one linear classifier for each learning rate and each of four inputs, on the same minibatches.

    The features of an image are the CLS tokens of its last blocks, followed by its mean patch token. The inputs are the
    CLS token of the last block or of all these blocks, each with and without the mean patch token. Each classifier
    equals the result of `fit_sgd_linear` for its input and rate with the same `key`.

    On a mesh each device keeps its share of the training features, and trains its share of the rates.

    Raises:
        UserError: features, labels or settings that cannot be learned from.
    """
    _check((train_features, train_labels), steps, batch_size, num_classes)
    check_range(heldout_labels, num_classes)
    check_finite(heldout_features)
    blocks = train_features.shape[1] - 1
    inputs = [(n, mean_patch) for n in dict.fromkeys((1, blocks)) for mean_patch in (False, True)]
    columns = tuple(_columns(train_features.shape[1:], *choice) for choice in inputs)
    train, heldout = (train_features, train_labels), (heldout_features, heldout_labels)
    options = {"columns": columns, "num_classes": num_classes}
    training = {"steps": steps, "batch_size": min(batch_size, len(train_labels))}
    if mesh is None or mesh.size == 1:
        rates = jnp.asarray(learning_rates, float)
        heads = train_heads(_flat(train_features), jnp.asarray(train_labels), key, rates, **training, **options)
        loss, accuracy = evaluate_heads(heads, _flat(heldout_features), jnp.asarray(heldout_labels), **options)
    else:
        heads, loss, accuracy = _sweep_on(mesh, train, heldout, key, learning_rates, training, options)
    loss, accuracy = np.asarray(loss), np.asarray(accuracy)
    best = int(np.lexsort((loss, -accuracy))[0])
    group, place = divmod(best, len(learning_rates))
    mine = slice(place * num_classes, (place + 1) * num_classes)
    head = LinearHead(heads[group].kernel[:, mine], heads[group].bias[mine])
    settings = tuple(SweepSettings(rate, *choice) for choice in inputs for rate in learning_rates)
    return SweepResult(settings, accuracy, loss, best, head)


def _sweep_on(
    mesh: Mesh,
    train: tuple,
    heldout: tuple,
    key: Key[Array, ""],
    learning_rates: Sequence[float],
    training: dict,
    options: dict,
) -> tuple[list[LinearHead], np.ndarray, np.ndarray]:
    """Heads, held-out loss and accuracy, by devices that each have a share of the features and of the rates."""
    whole = replicated(mesh)
    # As many rates as can be shared; those that are added move nothing.
    rates = np.zeros(-(-len(learning_rates) // mesh.size) * mesh.size)
    rates[: len(learning_rates)] = learning_rates
    features, labels = (np.asarray(one) for one in train)
    features = np.pad(_flat_rows(features), ((0, -len(features) % mesh.size), (0, 0)))
    given = jax.device_put(jnp.asarray(labels), whole), jax.device_put(key, whole), jax.device_put(rates, whole)
    train_on = jax.jit(on_mesh(partial(train_heads, **training, **options), mesh))
    heads = train_on(jax.device_put(features, batch_sharding(mesh)), *given)
    evaluate = jax.jit(on_mesh(partial(evaluate_heads, **options), mesh))
    numbers, counts = [], []
    for start in range(0, len(heldout[1]), _ROWS):
        rows = slice(start, start + _ROWS)
        part = _flat_rows(np.asarray(heldout[0][rows])), np.asarray(heldout[1][rows])
        numbers.append(jax.tree.map(np.asarray, evaluate(heads, *jax.device_put(part, whole))))
        counts.append(len(part[1]))
    loss, accuracy = (
        np.average(np.stack(one), axis=0, weights=counts).reshape(-1, len(rates))[:, : len(learning_rates)].ravel()
        for one in zip(*numbers)
    )
    return jax.tree.map(np.asarray, heads), loss, accuracy


def _flat_rows(features: np.ndarray) -> Float[np.ndarray, "images width"]:
    return features.reshape(len(features), -1).astype(jnp.asarray(0.0).dtype)


def fit_sgd_linear(
    features: Float[Array | np.ndarray, "images width"],
    labels: Int[Array | np.ndarray, " images"],
    *,
    num_classes: int,
    key: Key[Array, ""],
    learning_rate: float,
    steps: int = 12_500,
    batch_size: int = 128,
) -> LinearHead:
    """Trains a single classifier of the sweep: SGD with momentum 0.9, a cosine to zero, no weight decay.

    The initial kernel is normal with deviation 0.01, the initial bias zero. The rate is `learning_rate` · `batch_size`
    / 256.

    Raises:
        UserError: features, labels or settings that cannot be learned from.
    """
    _check((features, labels), steps, batch_size, num_classes)
    (head,) = train_heads(
        jnp.asarray(features, float),
        jnp.asarray(labels),
        key,
        jnp.asarray([learning_rate], float),
        columns=((0, features.shape[1]),),
        num_classes=num_classes,
        steps=steps,
        batch_size=min(batch_size, len(labels)),
    )
    return head


@partial(jax.jit, static_argnames=("columns", "num_classes", "steps", "batch_size"))
def train_heads(features, labels, key, learning_rates, *, columns, num_classes, steps, batch_size) -> list[LinearHead]:
    """For each of `columns`, the heads of all learning rates side by side, "width rates*classes"."""
    init_key, order_key = jax.random.split(key)
    rates = jnp.repeat(learning_rates * (batch_size / 256), num_classes)
    heads = _shared([_initial(init_key, stop - start, num_classes, len(learning_rates)) for start, stop in columns])

    def loss(heads, rows, labels):
        scores = [_scores(head, rows[:, slice(*place)], num_classes) for head, place in zip(heads, columns)]
        return sum(cross_entropy(score, labels[:, None]).mean(axis=0).sum() for score in scores)

    def step(carry, batch_and_step):
        heads, velocity = carry
        batch, step = batch_and_step
        gradients = jax.grad(loss)(heads, features[batch], labels[batch])
        velocity = jax.tree.map(lambda v, g: _MOMENTUM * v + g, velocity, gradients)
        step_size = rates * (0.5 * (1 + jnp.cos(jnp.pi * step / steps)))
        heads = jax.tree.map(lambda p, v: p - jnp.broadcast_to(step_size, v.shape) * v, heads, velocity)
        return (_shared(heads), velocity), None

    batches = minibatches(order_key, len(labels), batch_size, steps)
    carry = heads, jax.tree.map(jnp.zeros_like, heads)
    return jax.lax.scan(step, carry, (batches, jnp.arange(steps)))[0][0]


def _shared(heads: list[LinearHead]) -> list[LinearHead]:
    """Heads whose rates are divided among the devices of a mesh."""
    return [LinearHead(divide(head.kernel, axis=1), divide(head.bias)) for head in heads]


@partial(jax.jit, static_argnames=("columns", "num_classes"))
def evaluate_heads(heads, features, labels, *, columns, num_classes) -> tuple[Array, Array]:
    """Mean loss and accuracy of each head, computed in chunks of images."""

    def one(row_and_label):
        row, label = row_and_label
        rows = [row[None, slice(*place)] for place in columns]
        scores = jnp.concatenate([_scores(head, one, num_classes)[0] for head, one in zip(heads, rows)])
        return cross_entropy(scores, jnp.broadcast_to(label, len(scores))), scores.argmax(axis=-1) == label

    loss, hits = jax.lax.map(one, (features, labels), batch_size=_ROWS)
    return loss.mean(axis=0), hits.mean(axis=0)


def _scores(head: LinearHead, rows: Array, num_classes: int) -> Array:
    """Logits "images rates classes"."""
    logits = jnp.matmul(rows, head.kernel, precision="highest") + head.bias[None]
    return logits.reshape(len(rows), -1, num_classes)


def _initial(key: Array, width: int, num_classes: int, rates: int) -> LinearHead:
    kernel = _INITIAL_DEVIATION * jax.random.normal(key, (width, num_classes), jnp.asarray(0.0).dtype)
    return LinearHead(jnp.tile(kernel, rates), jnp.zeros(rates * num_classes))


def _columns(shape: tuple[int, ...], blocks: int, mean_patch: bool) -> tuple[int, int]:
    """First column, and the one after the last, of an input in the flattened tokens of an image."""
    tokens, dim = shape
    require(1 <= blocks < tokens, "blocks", blocks, f"between 1 and the {tokens - 1} blocks that there are features of")
    return (tokens - 1 - blocks) * dim, (tokens if mean_patch else tokens - 1) * dim


def _flat(features: BlockFeatures) -> Array:
    return jnp.asarray(features, float).reshape(len(features), -1)


def _check(train: tuple, steps: int, batch_size: int, num_classes: int) -> None:
    features, labels = train
    check_labelled(features, labels, num_classes)
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        require(value >= 1, name, value, "a positive number")
