"""LayerNorm, and a residual branch that starts with one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float

from dinojax.precision import at_least_float32


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over the last axis; its statistics are computed in float32 at least."""

    def __init__(self, num_features: int, *, epsilon: float = 1e-6, rngs: nnx.Rngs):
        super().__init__(num_features, epsilon=epsilon, use_fast_variance=False, rngs=rngs)

    def branch(
        self, x: Float[Array, "batch tokens dim"]
    ) -> tuple[Float[Array, "batch tokens dim"], Float[Array, "batch tokens dim"]]:
        """`x` and its norm, of which the one continues the residual stream and the other begins a branch.

        On a CPU, the gradients of both are added in a function that XLA does not inline. The gradient of the residual
        stream is a sum over all later branches, and XLA:CPU would not store it: each block would add all terms again,
        and compute the gradients of their norms again with them.
        """
        assert self.scale is not None and self.bias is not None
        return _branch(x, self.scale[...], self.bias[...], self.epsilon)


def _centred(x: Array, epsilon: float) -> tuple[Array, Array]:
    """The deviations from the mean, and the reciprocal of the standard deviation."""
    x = x.astype(at_least_float32(x.dtype))
    centred = x - x.mean(-1, keepdims=True)
    return centred, jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _branch(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, Array]:
    centred, reciprocal = _centred(x, epsilon)
    return x, (centred * (reciprocal * scale[None, None]) + bias[None, None]).astype(x.dtype)


@_branch.defjvp
def _branch_jvp(epsilon: float, primals: tuple, tangents: tuple) -> tuple:
    x, scale, _ = primals
    centred, reciprocal = _centred(x, epsilon)
    linear = (centred * reciprocal, reciprocal, scale, *tangents)
    return _branch(*primals, epsilon), _separate(*linear) if _alone_on_cpu() else _tangents(*linear)


def _tangents(normed, reciprocal, scale, x, scale_, bias_) -> tuple:
    """The change of both outputs with the changes of x, scale and bias; JAX transposes it into the gradient."""
    change = x.astype(normed.dtype)
    change = change - change.mean(-1, keepdims=True) - normed * (normed * change).mean(-1, keepdims=True)
    change = change * (reciprocal * scale[None, None]) + normed * scale_[None, None] + bias_[None, None]
    return x, change.astype(x.dtype)


_jitted_tangents = jax.jit(_tangents)


def _separate(*arguments: Array | np.ndarray) -> tuple:
    """`_tangents` as a function that XLA does not merge with its surroundings."""
    with set_xla_metadata(inlineable="false"):
        return _jitted_tangents(*arguments)


def _alone_on_cpu() -> bool:
    """Whether this is compiled for one CPU; the other compilers store the gradient by themselves."""
    return jax.default_backend() == "cpu" and not jax.sharding.get_abstract_mesh().shape
