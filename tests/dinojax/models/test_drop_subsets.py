"""Drop path by subsets: a branch is computed for some images only, and added to them alone, rescaled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dinojax import VisionTransformer, ViTConfig
from dinojax.models.layers import add_branch
from dinojax.models.norm import LayerNorm

NORM = LayerNorm(3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("rate", "kept"), [(0.3, 5), (0.05, 7), (0.99, 1)])
def test_a_random_subset_gets_the_rescaled_branch(rate, kept):
    """int(8 · (1 - rate)) of 8 images, at least one."""
    x, seen = jnp.asarray(np.random.default_rng(0).standard_normal((8, 2, 3)), jnp.float32), []

    def branch(x):
        seen.append(x.shape)
        return jnp.sin(x)

    chosen = set()
    for seed in range(4):
        found = add_branch(x, NORM, branch, rate, jax.random.key(seed), drop_subsets=True)
        changed = np.flatnonzero((found != x).any(axis=(1, 2)))
        assert len(changed) == kept
        expected = np.asarray(x[changed] + jnp.sin(NORM(x[changed])) * (8 / kept))
        np.testing.assert_allclose(found[changed], expected, rtol=1e-6)
        chosen.add(tuple(changed))
    assert set(seen) == {(kept, 2, 3)}  # the others are not even computed
    assert len(chosen) > 1


def test_without_a_key_or_at_rate_zero_nothing_is_dropped():
    x = jnp.arange(24.0).reshape(4, 2, 3) ** 2
    for rate, key in ((0.5, None), (0.0, jax.random.key(0))):
        assert (add_branch(x, NORM, jnp.sin, rate, key, drop_subsets=True) == x + jnp.sin(NORM(x))).all()


def test_a_network_drops_subsets_in_every_block():
    """At a rate that keeps one image of three, each of four branches leaves the two others as they are."""
    config = ViTConfig(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, drop_path_rate=0.5,
                       drop_path_uniform=True)  # fmt: skip
    images = np.random.default_rng(0).standard_normal((3, 8, 8, 3)).astype(np.float32)
    model = VisionTransformer(config, rngs=nnx.Rngs(0))

    @jax.jit
    def change(key):
        return jnp.abs(model(images, key=key, drop_subsets=True).prenorm - model._embed(images)).max(axis=(1, 2))

    untouched = [int((change(jax.random.key(seed)) < 1e-6).sum()) for seed in range(12)]
    assert set(untouched) <= {0, 1, 2} and len(set(untouched)) > 1
