"""The precision of sums in half-precision models, and of products in float32 ones."""

import jax.numpy as jnp
from jaxtyping import DTypeLike


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """float32 for narrower dtypes; float32 and float64 as they are."""
    return jnp.promote_types(dtype, jnp.float32)


def matmul_precision(dtype: DTypeLike) -> str:
    """For `jax.default_matmul_precision`: accelerators would otherwise multiply float32 in lower precision."""
    return "highest" if dtype == jnp.float32 else "default"
