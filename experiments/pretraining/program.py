"""The networks, schedules, optimiser and compiled steps that the settings of a pretraining stand for."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from dinojax import DINOHead, Preprocessing, VisionTransformer, ViTConfig
from dinojax.parallel import abstract_on, make_mesh, on_mesh, state_shardings
from dinojax.pretraining.dinov2_optim import dinov2_optimizer
from dinojax.pretraining.dinov2_step import (
    DINOv2,
    DINOv2Objective,
    init_dinov2_state,
    make_dinov2_train_step,
    with_masks,
)
from dinojax.pretraining.masking import BlockMasking
from dinojax.pretraining.optim import dino_optimizer, scale_part
from dinojax.pretraining.schedules import Schedule, cosine_schedule, teacher_temp_schedule
from dinojax.pretraining.step import DINO, TrainState, TrainStep, init_state, make_pretrain_steps, make_train_step
from experiments.pretraining.config import PretrainConfig
from experiments.runs.settings import resolve_dtype

Networks = DINO | DINOv2


class Program(NamedTuple):
    """The compiled computation of a run."""

    steps: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    """See `dinojax.pretraining.step.make_pretrain_steps`; jitted, the state is donated."""
    init: Callable[[], TrainState]
    """The state before the first step, on the devices of the mesh."""
    abstract: TrainState
    """Shapes and dtypes of the state, and on several devices its shardings."""
    mesh: Mesh
    schedules: dict[str, Schedule]
    """learning_rate, weight_decay, teacher_momentum, teacher_temp and, where it changes, backbone_factor; by step."""
    backbone_graph: nnx.GraphDef


def make_program(config: PretrainConfig, steps_per_epoch: int, start: VisionTransformer | None = None) -> Program:
    """The program of these settings; nothing is computed yet.

    Args:
        config: completed by `experiments.pretraining.start.load_start`.
        steps_per_epoch: number of batches in the training images.
        start: the backbone that the training starts from; None draws one.
    """
    schedules = make_schedules(config, steps_per_epoch)
    networks = nnx.eval_shape(lambda: make_networks(config))
    optimizer = _optimizer(config, schedules, steps_per_epoch)
    _, draws = jax.random.split(jax.random.key(config.run.seed))
    make_step = _dino_step if isinstance(networks, DINO) else _dinov2_step
    steps = make_pretrain_steps(
        make_step(config, networks, optimizer, schedules, draws),
        config.crops,
        draws,
        drop_path=config.model.drop_path_rate > 0,
    )
    mesh = make_mesh(config.compute.mesh)
    init, abstract = _init(config, optimizer, start, mesh)
    return Program(
        steps=jax.jit(on_mesh(steps, mesh), donate_argnums=0),
        init=init,
        abstract=abstract,
        mesh=mesh,
        schedules=schedules,
        backbone_graph=nnx.graphdef(networks.backbone),
    )


def make_networks(config: PretrainConfig) -> Networks:
    """Backbone and heads, drawn from the seed."""
    weights, _ = jax.random.split(jax.random.key(config.run.seed))
    rngs = nnx.Rngs(weights)
    backbone = VisionTransformer(vit_config(config), rngs=rngs, preprocessing=preprocessing(config))
    model, patch_prototypes = config.model, config.objective.patch_prototypes
    dinov2 = config.objective.method == "dinov2"
    head = functools.partial(
        DINOHead,
        model.embed_dim,
        hidden_dim=model.head_hidden_dim,
        bottleneck_dim=model.bottleneck_dim,
        norm_last_layer=model.norm_last_layer and not dinov2,  # DINOv2 learns the lengths of its prototypes
        rngs=rngs,
    )
    if not dinov2:
        return DINO(backbone, head(model.prototypes))
    return DINOv2(backbone, head(model.prototypes), head(patch_prototypes) if patch_prototypes else None)


def vit_config(config: PretrainConfig) -> ViTConfig:
    """The architecture of the backbone."""
    model, given = config.model, config.architecture
    if given is not None:
        return dataclasses.replace(given, drop_path_rate=model.drop_path_rate)
    return ViTConfig(
        img_size=config.crops.global_size,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        drop_path_rate=model.drop_path_rate,
        family=config.objective.method,
    )


def preprocessing(config: PretrainConfig) -> Preprocessing:
    """What the backbone expects of its images."""
    crops = config.crops
    return Preprocessing(crops.mean, crops.std, crops.global_size, config.model.patch_size)


def make_schedules(config: PretrainConfig, steps_per_epoch: int) -> dict[str, Schedule]:
    """Schedules (step → value) by name."""
    training, distillation, dinov2 = config.training, config.distillation, config.objective.method == "dinov2"
    total, scale = training.epochs * steps_per_epoch, training.batch_size / 256
    warmup_epochs = distillation.warmup_teacher_temp_epochs
    temperatures = distillation.warmup_teacher_temp, distillation.teacher_temp
    schedules = {
        "learning_rate": cosine_schedule(
            training.learning_rate * (math.sqrt(scale) if dinov2 else scale),
            training.min_lr,
            total,
            warmup_steps=training.warmup_epochs * steps_per_epoch,
        ),
        "weight_decay": cosine_schedule(training.weight_decay, training.weight_decay_end, total),
        "teacher_momentum": cosine_schedule(distillation.teacher_momentum, distillation.teacher_momentum_end, total),
        "teacher_temp": (
            _rising(*temperatures, warmup_epochs * steps_per_epoch, total)
            if dinov2
            else teacher_temp_schedule(*temperatures, warmup_epochs=warmup_epochs, steps_per_epoch=steps_per_epoch)
        ),
    }
    if config.start.heads_warmup or config.start.backbone_rate != 1:
        schedules["backbone_factor"] = _backbone_factor(config, steps_per_epoch)
    return schedules


def _backbone_factor(config: PretrainConfig, steps_per_epoch: int) -> Schedule:
    """0 while the heads learn alone, then linear to `backbone_rate`."""
    frozen, last = config.start.heads_warmup * steps_per_epoch, config.start.backbone_rate
    rising = config.training.warmup_epochs * steps_per_epoch if frozen else 0

    def factor(step: jax.Array | int) -> jax.Array:
        return last * jnp.clip((jnp.asarray(step, float) - frozen + 1) / max(rising, 1), 0, 1)

    return factor


def _rising(first: float, last: float, steps: int, total: int) -> Schedule:
    """DINOv2's temperature, which moves in every step of the warm-up, and then stays."""
    return cosine_schedule(last, last, max(total, steps), warmup_steps=steps, start_value=first)


def _optimizer(
    config: PretrainConfig, schedules: dict[str, Schedule], steps_per_epoch: int
) -> optax.GradientTransformation:
    training, objective = config.training, config.objective
    common = {
        "clip_norm": training.clip_norm,
        "freeze_last_layer_steps": training.freeze_last_layer * steps_per_epoch,
    }
    rates = schedules["learning_rate"], schedules["weight_decay"]
    if objective.method == "dino":
        optimizer = dino_optimizer(*rates, **common, frozen=("weight_g",) if config.model.norm_last_layer else ())
    else:
        factors = {"layer_decay": objective.layer_decay, "patch_embed_factor": objective.patch_embed_factor}
        optimizer = dinov2_optimizer(*rates, **common, **factors)
    if "backbone_factor" not in schedules:
        return optimizer
    return optax.chain(optimizer, scale_part("backbone", schedules["backbone_factor"]))


def _common(config: PretrainConfig, schedules: dict[str, Schedule]) -> dict[str, Any]:
    """The arguments that both steps take."""
    return {
        "teacher_temp": schedules["teacher_temp"],
        "teacher_momentum": schedules["teacher_momentum"],
        "compute_dtype": compute_dtype(config),
        "accumulation_steps": config.compute.accumulation_steps,
        "remat": config.compute.remat,
        "prototype_chunk": config.compute.prototype_chunk,
    }


def _dino_step(
    config: PretrainConfig,
    networks: DINO,
    optimizer: optax.GradientTransformation,
    schedules: dict[str, Schedule],
    _: jax.Array,
) -> TrainStep:
    return make_train_step(
        networks,
        optimizer,
        **_common(config, schedules),
        student_temp=config.distillation.student_temp,
        center_momentum=config.distillation.center_momentum,
        clip_norm=config.training.clip_norm,
    )


def _dinov2_step(
    config: PretrainConfig,
    networks: DINOv2,
    optimizer: optax.GradientTransformation,
    schedules: dict[str, Schedule],
    draws: jax.Array,
) -> TrainStep:
    objective, side = config.objective, config.crops.global_size // config.model.patch_size
    masking = BlockMasking(
        side, side, mask_sample_probability=objective.mask_probability, mask_ratio_min_max=objective.mask_ratio
    )
    images = 2 * config.training.batch_size
    step = make_dinov2_train_step(
        networks,
        optimizer,
        **_common(config, schedules),
        most_masked=masking.most_masked(images, images // config.compute.accumulation_steps),
        objective=DINOv2Objective(
            centering=objective.centering,
            koleo_loss_weight=objective.koleo_weight,
            ibot_loss_weight=objective.ibot_weight,
            student_temp=config.distillation.student_temp,
            center_momentum=config.distillation.center_momentum,
        ),
    )
    return with_masks(step, masking, jax.random.fold_in(draws, 2))


def _init(
    config: PretrainConfig, optimizer: optax.GradientTransformation, start: VisionTransformer | None, mesh: Mesh
) -> tuple[Callable[[], TrainState], TrainState]:
    """The function that makes the first state, and what it gives, abstract."""
    of_networks = init_state if config.objective.method == "dino" else init_dinov2_state

    def init(*given: Any) -> TrainState:
        networks = make_networks(config)
        for backbone in given:
            nnx.update(networks.backbone, backbone)
        return of_networks(networks, optimizer)

    given = () if start is None else (nnx.state(start, nnx.Param),)
    abstract = jax.eval_shape(init, *given)
    if mesh.size == 1:
        return functools.partial(jax.jit(init), *given), abstract
    placed = jax.jit(init, out_shardings=state_shardings(mesh, abstract))
    return functools.partial(placed, *given), abstract_on(mesh, abstract)


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
