"""DINO's projection head.

Source: facebookresearch/dino 7c446df `vision_transformer.DINOHead`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dinojax.models.layers import Linear, Module, gelu, torch_default_init
from dinojax.precision import at_least_float32


class DINOHead(Module):
    """DINO's head: an MLP with exact GELU, scaling to unit length, and products with the prototypes.

    Args:
        in_dim: width of the features.
        out_dim: number of prototypes.
        hidden_dim: width of the hidden layers of the MLP.
        bottleneck_dim: width of the embedding and of the prototypes.
        nlayers: number of linear layers in the MLP, one or more.
        norm_last_layer: keep the lengths `weight_g` of the prototypes fixed, as DINO v1 does by default; no gradient
            reaches them.
        rngs: draws the initial values.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        nlayers: int = 3,
        norm_last_layer: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        widths = [in_dim] + [hidden_dim] * (nlayers - 1) + [bottleneck_dim]
        layers = [Linear(*pair, rngs=rngs) for pair in itertools.pairwise(widths)]
        # Upstream's names count the GELUs between the layers: mlp.0, mlp.2, mlp.4; a single layer is just `mlp`.
        self.mlp = layers[0] if nlayers == 1 else nnx.Dict({str(2 * i): layer for i, layer in enumerate(layers)})
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, train_norm=not norm_last_layer, rngs=rngs)

    def __call__(self, features: Float[Array | np.ndarray, "*batch in_dim"]) -> Float[Array, "*batch prototypes"]:
        return self.last_layer(self.embed(features))

    def embed(self, features: Float[Array | np.ndarray, "*batch in_dim"]) -> Float[Array, "*batch bottleneck_dim"]:
        """The embedding that is multiplied with the prototypes, of length one."""
        x = features
        if isinstance(self.mlp, nnx.Dict):
            *hidden, last = sorted(self.mlp.keys(), key=int)
            for name in hidden:
                x = gelu(self.mlp[name](x))
            x = self.mlp[last](x)
        else:
            x = self.mlp(x)
        return _unit_length(x)


class WeightNormLinear(Module):
    """Bias-free linear layer whose row k is `weight_v[k]` scaled to length `weight_g[k]` (torch's layout and names)."""

    def __init__(self, in_dim: int, out_dim: int, *, train_norm: bool, rngs: nnx.Rngs):
        self.train_norm = train_norm
        self.weight_v = nnx.Param(torch_default_init(in_dim)(rngs.params(), (out_dim, in_dim)))
        self.weight_g = nnx.Param(jnp.ones((out_dim, 1)))

    def __call__(self, x: Float[Array, "*batch in_dim"]) -> Float[Array, "*batch out_dim"]:
        return (x.reshape(-1, x.shape[-1]) @ self.weight().T).reshape(*x.shape[:-1], -1)

    def weight(self) -> Float[Array, "out_dim in_dim"]:
        """The effective weight: rows of `weight_v` scaled to the lengths `weight_g`."""
        length = self.weight_g[...] if self.train_norm else jax.lax.stop_gradient(self.weight_g[...])
        return length * _unit_length(self.weight_v[...])


def _unit_length(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Scales the last axis to length one like torch's `normalize`: a zero vector stays zero, with a finite gradient."""
    precise = x.astype(at_least_float32(x.dtype))
    squared = jnp.sum(precise * precise, axis=-1, keepdims=True)
    return (precise * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))).astype(x.dtype)
