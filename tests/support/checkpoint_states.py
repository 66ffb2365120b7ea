"""States to keep in checkpoints, and what makes two of them the same."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dinojax import DINOHead, VisionTransformer, ViTConfig
from dinojax.checkpoint import TrainingCheckpoints
from dinojax.pretraining.optim import dino_optimizer
from dinojax.pretraining.step import DINO, init_state, make_train_step


def state_of(step):
    """Large enough that its arrays lie in files of their own, and different in every step."""
    return {
        "model": {"weight": jnp.arange(6000.0) + step, "bias": jnp.full(40, step, jnp.bfloat16)},
        "step": step * ONE,
    }


ONE = jnp.ones([], jnp.int32)
LIKE = jax.eval_shape(lambda: state_of(1))


def save_steps(folder, *steps, scores=None, **keep):
    with TrainingCheckpoints(folder, **keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(step), record={"seen": 10 * step}, score=(scores or {}).get(step))


def bits(leaf):
    data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return leaf.dtype, leaf.shape, np.asarray(data).tobytes()


def assert_same(found, expected):
    """Structure, classes and every bit; arrays of JAX."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected)):
        assert bits(one) == bits(other), path


def tiny_training(depth=1):
    """A first state, and a step that takes the buffers of the state it is given."""
    rngs = nnx.Rngs(0)
    config = ViTConfig(img_size=16, patch_size=4, embed_dim=16, depth=depth, num_heads=2)
    model = DINO(VisionTransformer(config, rngs=rngs), DINOHead(16, 24, hidden_dim=24, bottleneck_dim=8, rngs=rngs))
    optimizer = dino_optimizer(
        lambda step: 1e-2 + 1e-3 * step, lambda step: 0.04, freeze_last_layer_steps=1, frozen=("weight_g",)
    )
    step = make_train_step(model, optimizer, teacher_temp=lambda step: 0.05, teacher_momentum=lambda step: 0.9)
    crops = [jax.random.normal(jax.random.key(1), (2, 4, 16, 16, 3))]
    return lambda: init_state(model, optimizer), jax.jit(lambda state: step(state, crops)[0], donate_argnums=0)
