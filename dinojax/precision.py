"""The precision that half-precision models keep for their sums."""

import jax.numpy as jnp
from jaxtyping import DTypeLike


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """float32 for narrower dtypes; float32 and float64 as they are."""
    return jnp.promote_types(dtype, jnp.float32)
