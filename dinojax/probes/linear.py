"""Small networks on frozen features, trained with Adam: the linear probe and the two-layer MLP.

A whole training is one compiled program, a scan over epochs and minibatches. It computes in JAX's default float
(float64 if that is enabled).
"""

from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from dinojax.errors import require
from dinojax.probes.labelled import check_finite, check_labelled, check_range

_CONSTANT = 1e-6
Head = TypeVar("Head", "LinearHead", "MlpHead")


class LinearHead(NamedTuple):
    """A linear classifier on raw features: logits = features @ kernel + bias."""

    kernel: Float[Array, "dim classes"]
    bias: Float[Array, " classes"]


class MlpHead(NamedTuple):
    """A two-layer classifier: logits = relu(features @ hidden_kernel + hidden_bias) @ kernel + bias."""

    hidden_kernel: Float[Array, "dim hidden"]
    hidden_bias: Float[Array, " hidden"]
    kernel: Float[Array, "hidden classes"]
    bias: Float[Array, " classes"]


class EpochMetrics(NamedTuple):
    """Mean cross-entropy in nats and accuracy (a fraction) after each epoch, on training and held-out images."""

    train_loss: Float[Array, " epochs"]
    train_accuracy: Float[Array, " epochs"]
    heldout_loss: Float[Array, " epochs"]
    heldout_accuracy: Float[Array, " epochs"]


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
    """Trains one linear layer with softmax cross-entropy and Adam, and selects the best epoch on held-out images.

    The learning rate follows a cosine. During training the features are standardised with the mean and deviation of
    `train_features`; the returned head includes both and takes raw features. Each epoch shuffles the images with `key`
    and leaves out those after the last full minibatch.

    Returns:
        The head, the metrics of all epochs, and the index of the selected epoch: highest held-out accuracy, then lowest
        held-out loss.

    Raises:
        UserError: features, labels or settings that cannot be learned from.
    """
    train, heldout = _checked((train_features, train_labels), (heldout_features, heldout_labels), num_classes, epochs)
    initial = LinearHead(jnp.zeros((train_features.shape[1], num_classes)), jnp.zeros(num_classes))
    heads, metrics = _train(
        initial,
        train,
        heldout,
        key,
        learning_rate,
        epochs=epochs,
        batch_size=min(batch_size, len(train_labels)),
        shuffle=True,
        cosine=True,
        standardise=True,
    )
    best = _best_epoch(metrics)
    return LinearHead(*(array[best] for array in heads)), metrics, best


def fit_mlp(
    train_features: Float[Array | np.ndarray, "train dim"],
    train_labels: Int[Array | np.ndarray, " train"],
    heldout_features: Float[Array | np.ndarray, "heldout dim"],
    heldout_labels: Int[Array | np.ndarray, " heldout"],
    *,
    num_classes: int,
    key: Key[Array, ""],
    hidden_dim: int = 256,
    epochs: int = 25,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    shuffle: bool = False,
    initial: MlpHead | None = None,
) -> tuple[MlpHead, EpochMetrics, int]:
    """Trains two layers with a ReLU between them on raw features: softmax cross-entropy, Adam at a constant rate.

    With `shuffle`, each epoch draws its order from `key`. Without it, each epoch takes the images in the given order,
    so the images after the last full minibatch are never used. The initial values are those of PyTorch's `nn.Linear`
    (`initial_mlp`), unless `initial` is given.

    Returns:
        The head, the metrics of all epochs, and the index of the selected epoch: highest held-out accuracy, then lowest
        held-out loss.

    Raises:
        UserError: features, labels or settings that cannot be learned from.
    """
    train, heldout = _checked((train_features, train_labels), (heldout_features, heldout_labels), num_classes, epochs)
    init_key, order_key = jax.random.split(key)
    heads, metrics = _train(
        initial or initial_mlp(init_key, train_features.shape[1], hidden_dim, num_classes),
        train,
        heldout,
        order_key,
        learning_rate,
        epochs=epochs,
        batch_size=min(batch_size, len(train_labels)),
        shuffle=shuffle,
        cosine=False,
        standardise=False,
    )
    best = _best_epoch(metrics)
    return MlpHead(*(array[best] for array in heads)), metrics, best


def initial_mlp(key: Key[Array, ""], dim: int, hidden_dim: int, num_classes: int) -> MlpHead:
    """Weights and biases drawn uniformly within ±1/√inputs, as PyTorch's `nn.Linear` does."""

    def draw(key, inputs, shape):
        return jax.random.uniform(key, shape, jnp.asarray(0.0).dtype, -1, 1) / np.sqrt(inputs)

    sizes = (dim, (dim, hidden_dim)), (dim, (hidden_dim,)), (hidden_dim, (hidden_dim, num_classes))
    keys = jax.random.split(key, 4)
    return MlpHead(*(draw(k, *size) for k, size in zip(keys, (*sizes, (hidden_dim, (num_classes,))))))


def linear_logits(
    head: LinearHead, features: Float[Array | np.ndarray, "images dim"]
) -> Float[Array, "images classes"]:
    """Class scores before the softmax, in full float32 on every device."""
    return jnp.matmul(features, head.kernel, precision="highest") + head.bias[None]


def mlp_logits(head: MlpHead, features: Float[Array | np.ndarray, "images dim"]) -> Float[Array, "images classes"]:
    """Class scores before the softmax, in full float32 on every device."""
    hidden = jnp.matmul(features, head.hidden_kernel, precision="highest") + head.hidden_bias[None]
    return jnp.matmul(jax.nn.relu(hidden), head.kernel, precision="highest") + head.bias[None]


def cross_entropy(
    logits: Float[Array, "*images classes"], labels: Int[Array | np.ndarray, "*#images"]
) -> Float[Array, "*images"]:
    """Softmax cross-entropy in nats.

    It multiplies with one-hot labels: indexing would give the gradient a scatter.
    """
    picked = (logits * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)).sum(axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def minibatches(
    key: Key[Array, ""], images: int, batch_size: int, steps: int, *, shuffle: bool = True
) -> Int[Array, "steps batch_size"]:
    """Image indices of `steps` minibatches; each epoch has its own order and drops the incomplete minibatch."""
    per_epoch = images // batch_size
    if shuffle:
        keys = jax.random.split(key, -(-steps // per_epoch))
        orders = jax.lax.map(lambda key: jax.random.permutation(key, images)[: per_epoch * batch_size], keys)
    else:
        orders = jnp.tile(jnp.arange(per_epoch * batch_size), -(-steps // per_epoch))
    return orders.reshape(-1, batch_size)[:steps]


def train_steps(
    head: Head,
    opt_state: optax.OptState,
    features: Float[Array | np.ndarray, "images dim"],
    labels: Int[Array | np.ndarray, " images"],
    batches: Int[Array, "steps batch"],
    optimizer: optax.GradientTransformation,
) -> tuple[Head, optax.OptState]:
    """One optimizer step for each row of `batches`, which holds the indices of its images."""

    def step(carry, batch):
        head, opt_state = carry
        gradients = jax.grad(_loss)(head, features[batch], labels[batch])
        updates, opt_state = optimizer.update(gradients, opt_state)
        return (optax.apply_updates(head, updates), opt_state), None

    return jax.lax.scan(step, (head, opt_state), batches)[0]


def make_optimizer(learning_rate: float | Array, cosine_steps: int | None = None) -> optax.GradientTransformation:
    """Adam with PyTorch's defaults, at a constant rate or along a cosine that reaches zero after `cosine_steps`."""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, cosine_steps) if cosine_steps else learning_rate)


@partial(jax.jit, static_argnames=("epochs", "batch_size", "shuffle", "cosine", "standardise"))
def _train(initial, train, heldout, key, learning_rate, *, epochs, batch_size, shuffle, cosine, standardise) -> tuple:
    """Heads on raw features and metrics, stacked over epochs."""
    features, labels = train
    mean, scale = _standardisation(features)
    inputs = (features - mean[None]) * scale[None] if standardise else features
    steps = len(labels) // batch_size
    optimizer = make_optimizer(learning_rate, epochs * steps if cosine else None)

    def epoch(carry, batches):
        head, opt_state = carry
        carry = head, _ = train_steps(head, opt_state, inputs, labels, batches, optimizer)
        if standardise:
            shift = jnp.matmul(mean * scale, head.kernel, precision="highest")
            head = LinearHead(head.kernel * scale[:, None], head.bias - shift)
        return carry, (head, EpochMetrics(*_loss_and_accuracy(head, *train), *_loss_and_accuracy(head, *heldout)))

    batches = minibatches(key, len(labels), batch_size, epochs * steps, shuffle=shuffle)
    return jax.lax.scan(epoch, (initial, optimizer.init(initial)), batches.reshape(epochs, steps, batch_size))[1]


def _checked(train: tuple, heldout: tuple, num_classes: int, epochs: int) -> tuple[tuple, tuple]:
    """Checks both parts, and puts them on the device in the default float."""
    (features, labels), (heldout_features, heldout_labels) = train, heldout
    check_labelled(features, labels, num_classes)
    check_range(heldout_labels, num_classes)
    check_finite(heldout_features)
    require(epochs >= 1, "epochs", epochs, "a positive number")
    on_device = jnp.asarray(features, float), jnp.asarray(labels)
    return on_device, (jnp.asarray(heldout_features, float), jnp.asarray(heldout_labels))


def _standardisation(features: Array) -> tuple[Array, Array]:
    """Mean, and one over the deviation (zero for a constant feature)."""
    deviation = features.std(axis=0)
    return features.mean(axis=0), jnp.where(deviation > _CONSTANT, 1 / deviation, 0)


def _best_epoch(metrics: EpochMetrics) -> int:
    return int(np.lexsort((metrics.heldout_loss, -metrics.heldout_accuracy))[0])


def _logits(head: LinearHead | MlpHead, features: Array) -> Array:
    return mlp_logits(head, features) if isinstance(head, MlpHead) else linear_logits(head, features)


def _loss(head: LinearHead | MlpHead, features: Array, labels: Array) -> Array:
    return cross_entropy(_logits(head, features), labels).mean()


def _loss_and_accuracy(head: LinearHead | MlpHead, features: Array, labels: Array) -> tuple[Array, Array]:
    logits = _logits(head, features)
    return cross_entropy(logits, labels).mean(), (logits.argmax(axis=1) == labels).mean()
