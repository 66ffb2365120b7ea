"""Features of any number of images, batch by batch, each batch compiled once."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dinojax.errors import UserError
from dinojax.models.chunks import images_in_cache, in_chunks
from dinojax.models.vit import VisionTransformer
from dinojax.precision import matmul_precision

_ON_ACCELERATORS = 256


class Embeddings(NamedTuple):
    """One vector an image, after the final norm: the class token, and the mean of the patch tokens."""

    cls: Float[np.ndarray, "images dim"]
    mean_patch: Float[np.ndarray, "images dim"]


def embed(model: VisionTransformer, images: Array | np.ndarray, *, batch_size: int | None = None) -> Embeddings:
    """Features of images that `preprocess` made, in float32.

    Args:
        model: computes in the dtype of its parameters; see `VisionTransformer.astype`.
        images: normalised pixels "images height width channels".
        batch_size: images per pass. None takes what a CPU's cache holds, or 256 on a GPU or TPU.

    Raises:
        UserError: `batch_size` is not positive.
        ValueError: images that the model does not take.
    """
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size} is not a positive number")
    graphdef, state = nnx.split(model)
    size = min(batch_size or default_batch(model, images.shape), max(len(images), 1))
    parts = []
    for start in range(0, max(len(images), 1), size):  # no images at all: the model says so
        batch = images[start : start + size]
        count = len(batch)
        if start and count < size:  # the size that is compiled already
            batch = np.concatenate([batch, np.zeros((size - count, *batch.shape[1:]), batch.dtype)])
        parts.append(jax.tree.map(lambda x, count=count: np.asarray(x)[:count], _forward(graphdef, state, batch)))
    return Embeddings(*(np.concatenate(arrays) for arrays in zip(*parts)))


def default_batch(model: VisionTransformer, shape: tuple[int, ...]) -> int:
    """Images of "images height width channels" per pass, at most 256: on a CPU, as many as its cache holds."""
    if jax.default_backend() != "cpu" or len(shape) != 4:
        return _ON_ACCELERATORS
    tokens = shape[1] * shape[2] // model.config.patch_size**2 + 1
    return min(_ON_ACCELERATORS, images_in_cache(tokens, model.config.embed_dim))


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: nnx.GraphDef, state: Any, images: Array) -> tuple[Array, Array]:
    model = nnx.merge(graphdef, state)
    with jax.default_matmul_precision(matmul_precision(model.cls_token[...].dtype)):
        features = in_chunks(model, model.config, images)
    return features.cls_token.astype(jnp.float32), features.patch_tokens.astype(jnp.float32).mean(axis=1)
