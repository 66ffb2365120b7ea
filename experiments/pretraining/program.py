"""The networks, schedules, optimiser and compiled steps that the settings of a pretraining stand for."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dinojax import DINOHead, Preprocessing, VisionTransformer, ViTConfig
from dinojax.pretraining.optim import dino_optimizer
from dinojax.pretraining.schedules import Schedule, cosine_schedule, teacher_temp_schedule
from dinojax.pretraining.step import DINO, TrainState, init_state, make_pretrain_steps, make_train_step
from experiments.pretraining.config import PretrainConfig
from experiments.runs.settings import resolve_dtype


class Program(NamedTuple):
    """The compiled computation of a run."""

    steps: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    """See `dinojax.pretraining.step.make_pretrain_steps`; jitted, the state is donated."""
    init: Callable[[], TrainState]
    """The state before the first step."""
    schedules: dict[str, Schedule]
    """learning_rate, weight_decay, teacher_momentum, teacher_temp; by step."""
    backbone_graph: nnx.GraphDef


def make_program(config: PretrainConfig, steps_per_epoch: int) -> Program:
    """The program of these settings; nothing is computed yet."""
    schedules = make_schedules(config, steps_per_epoch)
    optimizer = dino_optimizer(
        schedules["learning_rate"],
        schedules["weight_decay"],
        clip_norm=config.training.clip_norm,
        freeze_last_layer_steps=config.training.freeze_last_layer * steps_per_epoch,
        frozen=("weight_g",) if config.model.norm_last_layer else (),
    )
    abstract = nnx.eval_shape(lambda: make_networks(config))
    train_step = make_train_step(
        abstract,
        optimizer,
        teacher_temp=schedules["teacher_temp"],
        teacher_momentum=schedules["teacher_momentum"],
        student_temp=config.distillation.student_temp,
        center_momentum=config.distillation.center_momentum,
        clip_norm=config.training.clip_norm,
        compute_dtype=compute_dtype(config),
        accumulation_steps=config.compute.accumulation_steps,
        remat=config.compute.remat,
        prototype_chunk=config.compute.prototype_chunk,
    )
    _, draws = jax.random.split(jax.random.key(config.run.seed))
    steps = make_pretrain_steps(train_step, config.crops, draws, drop_path=config.model.drop_path_rate > 0)
    return Program(
        steps=jax.jit(steps, donate_argnums=0),
        init=jax.jit(lambda: init_state(make_networks(config), optimizer)),
        schedules=schedules,
        backbone_graph=nnx.graphdef(abstract.backbone),
    )


def make_networks(config: PretrainConfig) -> DINO:
    """Backbone and head, drawn from the seed."""
    weights, _ = jax.random.split(jax.random.key(config.run.seed))
    rngs = nnx.Rngs(weights)
    backbone = VisionTransformer(vit_config(config), rngs=rngs, preprocessing=preprocessing(config))
    head = DINOHead(
        config.model.embed_dim,
        config.model.prototypes,
        hidden_dim=config.model.head_hidden_dim,
        bottleneck_dim=config.model.bottleneck_dim,
        norm_last_layer=config.model.norm_last_layer,
        rngs=rngs,
    )
    return DINO(backbone, head)


def vit_config(config: PretrainConfig) -> ViTConfig:
    """The architecture of the backbone."""
    model = config.model
    return ViTConfig(
        img_size=config.crops.global_size,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        drop_path_rate=model.drop_path_rate,
    )


def preprocessing(config: PretrainConfig) -> Preprocessing:
    """What the backbone expects of its images."""
    crops = config.crops
    return Preprocessing(crops.mean, crops.std, crops.global_size, config.model.patch_size)


def make_schedules(config: PretrainConfig, steps_per_epoch: int) -> dict[str, Schedule]:
    """Schedules (step → value) by name."""
    training, distillation = config.training, config.distillation
    total = training.epochs * steps_per_epoch
    return {
        "learning_rate": cosine_schedule(
            training.learning_rate * training.batch_size / 256,
            training.min_lr,
            total,
            warmup_steps=training.warmup_epochs * steps_per_epoch,
        ),
        "weight_decay": cosine_schedule(training.weight_decay, training.weight_decay_end, total),
        "teacher_momentum": cosine_schedule(distillation.teacher_momentum, distillation.teacher_momentum_end, total),
        "teacher_temp": teacher_temp_schedule(
            distillation.warmup_teacher_temp,
            distillation.teacher_temp,
            warmup_epochs=distillation.warmup_teacher_temp_epochs,
            steps_per_epoch=steps_per_epoch,
        ),
    }


def compute_dtype(config: PretrainConfig) -> jnp.dtype | None:
    """The number type that weights are cast to for the computation; None leaves their own float32."""
    name = resolve_dtype(config.compute.dtype)
    return None if name == "float32" else jnp.dtype(name)


@jax.jit
def is_sound(state: TrainState) -> jax.Array:
    """Whether all numbers of a state are finite, and the squares of its parameters too."""
    numbers = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves((state.student, state.teacher))]
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in (*numbers, *squares)]))
