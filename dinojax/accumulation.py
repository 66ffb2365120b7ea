"""Sums that are carried on: over a batch in parts, one after the other, and over steps as a moving average."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PyTree


def sum_over_parts(
    function: Callable[[PyTree, Key[Array, ""] | None], PyTree], parts: PyTree, key: Key[Array, ""] | None = None
) -> PyTree:
    """The sum of `function(part, key)` over the first axis of `parts`; each part gets a key of its own, or None."""

    def add(total: PyTree, indexed: tuple[Array, PyTree]) -> tuple[PyTree, None]:
        index, part = indexed
        found = function(part, None if key is None else jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, found), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(len(jax.tree.leaves(parts)[0])), parts))[0]


def moving_average(new: PyTree, old: PyTree, weight: Array | float) -> PyTree:
    """weight · new + (1 - weight) · old, in the dtypes of `old` whatever that of `weight`."""
    averaged = optax.incremental_update(new, old, weight)
    return jax.tree.map(lambda x, before: x.astype(before.dtype), averaged, old)


def part_size(batch: int, accumulation_steps: int) -> int:
    """Images of each part.

    Raises:
        ValueError: `accumulation_steps` does not divide the batch.
    """
    if batch % accumulation_steps:
        raise ValueError(f"accumulation_steps={accumulation_steps} does not divide the batch of {batch}")
    return batch // accumulation_steps
