"""Schedules: functions step → value, for use inside jit and as optax schedules.

Source: facebookresearch/dino 7c446df `utils.cosine_scheduler` and `main_dino.DINOLoss`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


def cosine_schedule(
    base_value: float, final_value: float, total_steps: int, *, warmup_steps: int = 0, start_value: float = 0.0
) -> Schedule:
    """Linear warm-up from `start_value` to `base_value`, both included, then a cosine towards `final_value`.

    As upstream, the cosine divides by the number of steps, so the last step is slightly short of `final_value`. Later
    steps keep the last value.

    Raises:
        ValueError: the warm-up is longer than `total_steps`.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps={warmup_steps} is not between 0 and total_steps={total_steps}")

    def value(step: Int[Array, ""] | int) -> Float[Array, ""]:
        # In the default float: 32-bit counters would otherwise give 32-bit values even if jax computes in 64 bits.
        step = jnp.minimum(jnp.asarray(step).astype(float), total_steps - 1)
        warmup = start_value + (base_value - start_value) * step / max(warmup_steps - 1, 1)
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        cosine = final_value + 0.5 * (base_value - final_value) * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup_steps, warmup, cosine)

    return value


def teacher_temp_schedule(warmup_value: float, value: float, *, warmup_epochs: int, steps_per_epoch: int) -> Schedule:
    """The teacher's temperature: it rises linearly from epoch to epoch, and stays at `value` after the warm-up."""

    def temperature(step: Int[Array, ""] | int) -> Float[Array, ""]:
        epoch = (jnp.asarray(step) // steps_per_epoch).astype(float)
        rising = warmup_value + (value - warmup_value) * epoch / max(warmup_epochs - 1, 1)
        return jnp.where(epoch < warmup_epochs, rising, value)

    return temperature
