"""LayerNorm at the head of a branch: the values and derivatives of Flax's own, which JAX differentiates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dinojax import VisionTransformer, ViTConfig
from dinojax.models.norm import LayerNorm


def norms(dtype=float):
    """Our LayerNorm and Flax's, with equal parameters that are not the initial ones, and an input."""
    draw = np.random.default_rng(0).standard_normal
    ours, flax = (
        LayerNorm(6, rngs=nnx.Rngs(0)),
        nnx.LayerNorm(6, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0)),
    )
    for name in ("scale", "bias"):
        value = jnp.asarray(draw(6), dtype)
        setattr(ours, name, nnx.Param(value))
        setattr(flax, name, nnx.Param(value))
    return ours, flax, jnp.asarray(3 * draw((2, 5, 6)) + 1, dtype)


def both(norm):
    """The outputs of `branch`, as a function of x and the parameters."""
    graphdef, state = nnx.split(norm)
    if isinstance(norm, LayerNorm):
        return lambda x, state: nnx.merge(graphdef, state).branch(x), state
    return lambda x, state: (x, nnx.merge(graphdef, state)(x)), state


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_values_are_those_of_flax(dtype):
    ours, flax, x = norms(dtype)
    same, normed = ours.branch(x)
    assert (same == x).all()
    np.testing.assert_array_equal(normed, flax(x))
    np.testing.assert_array_equal(ours(x), flax(x))


@pytest.mark.parametrize("jitted", [False, True])
def test_the_derivatives_are_those_of_flax(jitted):
    """Of the input and both parameters, forwards and backwards, with different weights on the two outputs."""
    with jax.enable_x64(True):
        ours, flax, x = norms()
        weights = np.random.default_rng(1).standard_normal((2, *x.shape))
        found = []
        for norm in (ours, flax):
            function, state = both(norm)

            def loss(x, state, function=function):
                return sum((w * jnp.sin(out)).sum() for w, out in zip(weights, function(x, state)))

            gradient = jax.grad(loss, argnums=(0, 1))
            gradient = jax.jit(gradient) if jitted else gradient
            forwards = jax.jvp(loss, (x, state), (weights[0], jax.tree.map(jnp.ones_like, state)))
            found.append(jax.tree.leaves((gradient(x, state), forwards)))
        for a, b in zip(*found, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_each_block_stores_the_gradient_of_the_residual_stream():
    """In the program for a CPU no fusion reads the activations of all blocks."""
    config = ViTConfig(img_size=8, patch_size=4, embed_dim=32, depth=8, num_heads=2)
    graphdef, state = nnx.split(VisionTransformer(config, rngs=nnx.Rngs(0)))

    def loss(state, images):
        return jnp.square(nnx.merge(graphdef, state)(images).cls_token).sum()

    program = jax.jit(jax.grad(loss)).lower(state, jnp.ones((2, 8, 8, 3))).compile().as_text()
    fusions = [line for line in program.splitlines() if line.startswith("%fused_computation")]
    assert fusions and max(line.count("f32[2,5,32]") for line in fusions) < 2 * config.depth
