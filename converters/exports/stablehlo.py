"""dinojax models → StableHLO: one file that `jax.export` runs on CPU, CUDA and TPU, for any batch size."""

from collections.abc import Sequence

import jax
import jax.export
import jax.numpy as jnp

from converters.exports.outputs import forward
from dinojax.models.vit import VisionTransformer

PLATFORMS = ("cpu", "cuda", "tpu")


def stablehlo(model: VisionTransformer, size: int, outputs: Sequence[str]) -> bytearray:
    """The program of a model with its parameters, as `jax.export.deserialize` reads it.

    Products are computed in full float32 precision on every platform, so that outputs are equal.

    Args:
        model: of any architecture.
        size: side in pixels of the square images.
        outputs: names among "cls", "patches" and "attention".
    """
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, size, size, model.config.in_chans), jnp.float32)
    with jax.default_matmul_precision("highest"):
        return jax.export.export(jax.jit(forward(model, outputs)), platforms=PLATFORMS)(images).serialize()
