"""JAX_ENABLE_X64=1: float32 networks train, and every part of their state keeps its dtype."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_TRAIN = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from dinojax import DINOHead, ViTConfig, VisionTransformer
from dinojax.finetune import *
from dinojax.pretraining.augment import MultiCropConfig
from dinojax.pretraining.optim import dino_optimizer
from dinojax.pretraining.schedules import cosine_schedule, teacher_temp_schedule
from dinojax.pretraining.step import *

assert jax.config.jax_enable_x64
shape, rngs = ViTConfig(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1, drop_path_rate=0.1), nnx.Rngs(0)
model = DINO(VisionTransformer(shape, rngs=rngs), DINOHead(8, 8, hidden_dim=8, bottleneck_dim=4, rngs=rngs))
nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model, nnx.Param)))
rate = cosine_schedule(1e-3, 1e-5, 10)

def same_dtypes(before, after):
    found = [(x.dtype, y.dtype) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    assert all(one == other for one, other in found), found

optimizer = dino_optimizer(rate, rate, freeze_last_layer_steps=1, frozen=("weight_g",))
temperature = teacher_temp_schedule(0.04, 0.07, warmup_epochs=2, steps_per_epoch=2)
step = make_train_step(
    model, optimizer, teacher_temp=temperature, teacher_momentum=rate, accumulation_steps=2, prototype_chunk=4
)
crops = MultiCropConfig(global_size=8, local_size=4, local_crops=1)
steps = jax.jit(make_pretrain_steps(step, crops, jax.random.key(0), drop_path=True))
state, rows = init_state(model, optimizer), jnp.zeros((2, 2), jnp.int32)
after, metrics = steps(state, jnp.ones((2, 8, 8, 3), jnp.uint8), Batches(rows, rows, rows[:, 0]), 2)
same_dtypes(state, after)
assert np.isfinite(metrics["loss"]).all() and metrics["loss"].dtype == np.float32

classifier = ImageClassifier(model.backbone, 3, rngs=nnx.Rngs(0))
for mode in ("llrd", "linear"):
    trainable, frozen = split_parameters(classifier, mode)
    optimizer = finetune_optimizer(mode, 1, learning_rate=rate, weight_decay=0.1, clip_norm=1.0)
    state = init_finetune_state(trainable, optimizer, ema=True)
    step = jax.jit(make_finetune_step(make_logits(classifier), optimizer, ema_decay=0.9, class_weights=np.ones(3)))
    after, metrics = step(state, frozen, np.ones((2, 8, 8, 3), np.float32), np.array([0, 2]), jax.random.key(1))
    same_dtypes(state, after)
    assert np.isfinite(metrics["loss"]) and metrics["loss"].dtype == np.float32
print("trained")
"""


@pytest.mark.slow  # compiles a pretraining and two fine-tuning steps in a process of its own
def test_float32_networks_train_where_jax_computes_in_64_bits():
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", _TRAIN],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], env=os.environ | {"JAX_ENABLE_X64": "1"},
    )  # fmt: skip
    assert done.stdout == "trained\n", done.stderr
