"""From the settings of a run to its networks, schedules, optimiser and compiled program."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dinojax import DINOHead, VisionTransformer, ViTConfig
from dinojax.pretraining.optim import dino_optimizer
from dinojax.pretraining.schedules import Schedule, cosine_schedule, teacher_temp_schedule
from dinojax.pretraining.step import DINO, TrainState, init_state, make_pretrain_steps, make_train_step
from experiments.pretraining.config import PretrainConfig


class Program(NamedTuple):
    """What a run computes with."""

    steps: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    """See `dinojax.pretraining.step.make_pretrain_steps`; jitted, the state is donated."""
    init: Callable[[], TrainState]
    """The state before the first step."""
    schedules: dict[str, Schedule]
    """learning_rate, weight_decay, teacher_momentum, teacher_temp; by step."""
    backbone_graph: nnx.GraphDef


def make_program(config: PretrainConfig, steps_per_epoch: int) -> Program:
    """Everything that follows from the settings and the number of steps; nothing is computed yet."""
    schedules = make_schedules(config, steps_per_epoch)
    optimizer = dino_optimizer(
        schedules["learning_rate"],
        schedules["weight_decay"],
        clip_norm=config.clip_norm,
        freeze_last_layer_steps=config.freeze_last_layer * steps_per_epoch,
        frozen=("weight_g",) if config.norm_last_layer else (),
    )
    abstract = nnx.eval_shape(lambda: make_networks(config))
    train_step = make_train_step(
        abstract,
        optimizer,
        teacher_temp=schedules["teacher_temp"],
        teacher_momentum=schedules["teacher_momentum"],
        student_temp=config.student_temp,
        center_momentum=config.center_momentum,
        clip_norm=config.clip_norm,
        compute_dtype=compute_dtype(config),
        accumulation_steps=config.accumulation_steps,
        remat=config.remat,
        prototype_chunk=config.prototype_chunk,
    )
    _, draws = jax.random.split(jax.random.key(config.seed))
    steps = make_pretrain_steps(train_step, config.crops, draws, drop_path=config.drop_path_rate > 0)
    return Program(
        steps=jax.jit(steps, donate_argnums=0),
        init=jax.jit(lambda: init_state(make_networks(config), optimizer)),
        schedules=schedules,
        backbone_graph=nnx.graphdef(abstract.backbone),
    )


def make_networks(config: PretrainConfig) -> DINO:
    """Backbone and head as they are drawn from the seed."""
    weights, _ = jax.random.split(jax.random.key(config.seed))
    rngs = nnx.Rngs(weights)
    backbone = VisionTransformer(vit_config(config), rngs=rngs)
    head = DINOHead(
        config.embed_dim,
        config.prototypes,
        hidden_dim=config.head_hidden_dim,
        bottleneck_dim=config.bottleneck_dim,
        norm_last_layer=config.norm_last_layer,
        rngs=rngs,
    )
    return DINO(backbone, head)


def vit_config(config: PretrainConfig) -> ViTConfig:
    """The backbone's."""
    return ViTConfig(
        img_size=config.crops.global_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        drop_path_rate=config.drop_path_rate,
    )


def make_schedules(config: PretrainConfig, steps_per_epoch: int) -> dict[str, Schedule]:
    """Step → value, for all that changes with the step."""
    total = config.epochs * steps_per_epoch
    return {
        "learning_rate": cosine_schedule(
            config.learning_rate * config.batch_size / 256,
            config.min_lr,
            total,
            warmup_steps=config.warmup_epochs * steps_per_epoch,
        ),
        "weight_decay": cosine_schedule(config.weight_decay, config.weight_decay_end, total),
        "teacher_momentum": cosine_schedule(config.teacher_momentum, config.teacher_momentum_end, total),
        "teacher_temp": teacher_temp_schedule(
            config.warmup_teacher_temp,
            config.teacher_temp,
            warmup_epochs=config.warmup_teacher_temp_epochs,
            steps_per_epoch=steps_per_epoch,
        ),
    }


def compute_dtype(config: PretrainConfig) -> jnp.dtype | None:
    """What the networks compute in where it is not their own float32."""
    on_cpu = jax.default_backend() == "cpu"
    name = ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype
    return None if name == "float32" else jnp.dtype(name)
