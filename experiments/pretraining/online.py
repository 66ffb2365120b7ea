"""Evaluation of a network's features in training: k-NN among training images, and rank; without labels, rank alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dinojax import image_ops as ops
from dinojax.models.chunks import in_chunks
from dinojax.parallel import divide, gather, on_mesh, replicated
from dinojax.pretraining.monitors import rank_me
from dinojax.probes import knn_predict, stratified_subset
from experiments.data.splits import Dataset
from experiments.pretraining.config import PretrainConfig
from experiments.pretraining.data import Images, SeveralSizesError, read_images

K = 20
_BATCH = 256

Embed = Callable[[Any, Images], Float[np.ndarray, "images dim"]]


def make_embed(graph: nnx.GraphDef, config: PretrainConfig, mesh: Mesh) -> Embed:
    """Returns `embed(backbone_state, images)`: class tokens of images, resized to the global crops' size."""
    size = config.crops.global_size

    def of_images(state: Any, images: Array) -> Array:
        images = divide(images)
        batch, height, width, _ = images.shape
        boxes = jnp.tile(jnp.array([0, 0, height, width], jnp.int32), (batch, 1))
        planes = ops.crop_resize(ops.to_planes(images), boxes, size)
        pixels = ops.normalize(planes, config.crops.mean, config.crops.std)
        backbone = nnx.merge(graph, gather(state))
        return in_chunks(backbone, backbone.config, pixels).cls_token

    forward = jax.jit(on_mesh(of_images, mesh), out_shardings=None if mesh.size == 1 else replicated(mesh))

    def embed(state: Any, images: Images) -> Float[np.ndarray, "images dim"]:
        batch = -(-min(_BATCH, len(images)) // mesh.size) * mesh.size
        features = []
        for start in range(0, len(images), batch):
            rows = np.arange(start, start + batch) % len(images)  # one size to compile for
            features.append(forward(state, images[rows]))
        return np.concatenate([np.asarray(part) for part in features])[: len(images)]

    return embed


@dataclasses.dataclass(frozen=True)
class Monitor:
    """Images whose features are watched."""

    queries: Images

    def rank(self, embed: Embed, backbone: Any) -> float:
        """RankMe of the queries' features."""
        return float(rank_me(jnp.asarray(embed(backbone, self.queries))))

    def evaluate(self, embed: Embed, backbone: Any) -> dict[str, float]:
        """What is logged."""
        return {"rank_me": self.rank(embed, backbone)}


@dataclasses.dataclass(frozen=True)
class LabelledMonitor(Monitor):
    """Training images that vote, and others, the queries, that they classify; no test image is among them."""

    query_labels: Int[np.ndarray, " queries"]
    voters: Images
    voter_labels: Int[np.ndarray, " voters"]
    classes: int

    @classmethod
    def of(cls, dataset: Dataset, images: Images, count: int) -> "LabelledMonitor":
        """`count` voters of every class in proportion and a quarter as many queries, the same in every run."""
        labels, classes = dataset.train.labels, len(dataset.class_names)
        count = max(min(count, len(labels) * 4 // 5), classes)
        voters = stratified_subset(labels, count, seed=0)
        rest = np.setdiff1d(np.arange(len(labels)), voters)
        queries = np.random.default_rng(0).permutation(rest)[: max(count // 4, classes)]
        return cls(images[queries], labels[queries], images[voters], labels[voters], classes)

    def evaluate(self, embed: Embed, backbone: Any) -> dict[str, float]:
        """k-NN accuracy (a fraction) and RankMe of the queries' features."""
        voters, queries = embed(backbone, self.voters), embed(backbone, self.queries)
        accuracy = knn_accuracy(voters, self.voter_labels, queries, self.query_labels, self.classes)
        return {"knn_accuracy": accuracy, "rank_me": float(rank_me(jnp.asarray(queries)))}


def make_monitor(dataset: Dataset, images: Images, side: int | None, count: int) -> Monitor:
    """The monitor of a training: by k-NN on training images if there are labels, else on the held-out images.

    Args:
        dataset: without class names if it has no labels.
        images: the training images, as they are stored.
        side: of the squares that images are stored as; None stores them as they are.
        count: number of voters.

    Raises:
        UserError: a held-out image that cannot be read.
    """
    if dataset.class_names:
        return LabelledMonitor.of(dataset, images, count)
    shape = images.shape[1:3]
    try:
        held_out = read_images(dataset.test, side)
    except SeveralSizesError:
        held_out = read_images(dataset.test, min(shape))
    return Monitor(held_out)


def knn_accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, classes: int
) -> float:
    """DINO's weighted k-NN with 20 neighbours, fewer where there are not so many images."""
    k = min(K, len(train))
    predicted = knn_predict(train, train_labels, test, num_classes=classes, ks=(k,))[k]
    return float(np.mean(predicted == test_labels))
