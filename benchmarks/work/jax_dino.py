"""Our side of `benchmarks.dino_step`: the steps of DINO and DINOv2, and the augmentation."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import DTypeLike

from benchmarks.work.dino_work import (
    GLOBAL_CROPS,
    GPU_PROOF_BATCH,
    PROOF_IMAGES,
    ROWS,
    Model,
    Recipe,
    first_steps,
    pictures,
    product_tflops,
    random_crops,
)
from benchmarks.work.dinov2_work import (
    DINOV2_ROWS,
    LAYER_SCALE,
    MASK_SHARES,
    MASKED_CROPS,
    DINOv2Recipe,
    DINOv2Row,
    random_masks,
)
from benchmarks.work.paired import Prepared, warmed_up
from converters.torch_to_flax import to_torch
from dinojax.models.config import ViTConfig
from dinojax.models.head import DINOHead
from dinojax.models.vit import VisionTransformer
from dinojax.pretraining.augment import MultiCropConfig, draw_views, multi_crop
from dinojax.pretraining.dinov2_optim import dinov2_optimizer
from dinojax.pretraining.dinov2_step import DINOv2, DINOv2Objective, init_dinov2_state, make_dinov2_train_step
from dinojax.pretraining.masking import BlockMasking
from dinojax.pretraining.optim import dino_optimizer
from dinojax.pretraining.schedules import Schedule, cosine_schedule
from dinojax.pretraining.step import DINO, init_state, make_train_step


class Trainer:
    """Our training, one jitted program a step.

    Args:
        model: the architecture and the initial parameters, whose buffers are given away.
        recipe: schedules and constants.
        crops: of raw images; the step then begins with the augmentation.
        options: more for `make_train_step`.
    """

    def __init__(self, model: DINO, recipe: Recipe, *, crops: MultiCropConfig | None = None, **options: Any):
        def cosine(first: float, last: float) -> Schedule:
            return cosine_schedule(first, last, recipe.total_steps)

        optimizer = dino_optimizer(
            cosine(recipe.learning_rate, recipe.min_learning_rate),
            lambda step: recipe.weight_decay,
            clip_norm=recipe.clip_norm,
            freeze_last_layer_steps=recipe.freeze_last_layer_steps,
            frozen=("weight_g",),
        )
        train_step = make_train_step(
            model,
            optimizer,
            teacher_temp=lambda step: recipe.teacher_temp,
            teacher_momentum=cosine(recipe.teacher_momentum, 1.0),
            student_temp=recipe.student_temp,
            center_momentum=recipe.center_momentum,
            clip_norm=recipe.clip_norm,
            **options,
        )

        def step_from_pixels(state: Any, images: jax.Array) -> Any:
            return train_step(state, multi_crop(jax.random.fold_in(jax.random.key(0), state.step), images, crops))

        self.graphdef, self.state = nnx.graphdef(model), init_state(model, optimizer)
        self.jitted = jax.jit(step_from_pixels if crops else train_step, donate_argnums=0)

    def step(self, inputs: Any) -> tuple[jax.Array, jax.Array]:
        """Trains on groups of crops or on raw images; the loss, and the norm of all gradients before clipping."""
        self.state, metrics = jax.block_until_ready(self.jitted(self.state, inputs))
        return metrics["loss"], metrics["gradient_norm"]

    def parameters(self) -> dict[str, np.ndarray]:
        """Student, teacher and center as `dino_work.differences` takes them."""
        return {"center": np.asarray(self.state.center)} | _networks(self.graphdef, self.state)


class DINOv2Trainer:
    """Our DINOv2 training, one jitted program a step.

    Args:
        model: the architecture and the initial parameters, whose buffers are given away.
        recipe: schedules and constants.
        most_masked: rows of patches that the head computes, whether or not a patch fills them.
        options: more for `make_dinov2_train_step`.
    """

    def __init__(self, model: DINOv2, recipe: DINOv2Recipe, *, most_masked: int, **options: Any):
        def cosine(first: float, last: float) -> Schedule:
            return cosine_schedule(first, last, recipe.total_steps)

        optimizer = dinov2_optimizer(
            cosine(recipe.learning_rate, recipe.min_learning_rate),
            cosine(recipe.weight_decay, recipe.last_weight_decay),
            clip_norm=recipe.clip_norm,
            layer_decay=recipe.layer_decay,
            patch_embed_factor=recipe.patch_embed_factor,
            freeze_last_layer_steps=recipe.freeze_last_layer_steps,
        )
        train_step = make_dinov2_train_step(
            model,
            optimizer,
            teacher_temp=lambda step: recipe.teacher_temp,
            teacher_momentum=cosine(recipe.teacher_momentum, 1.0),
            most_masked=most_masked,
            objective=DINOv2Objective(
                centering="sinkhorn_knopp",
                koleo_loss_weight=recipe.koleo_weight,
                ibot_loss_weight=recipe.patch_weight,
                student_temp=recipe.student_temp,
            ),
            **options,
        )
        self.graphdef, self.state = nnx.graphdef(model), init_dinov2_state(model, optimizer)
        self.jitted = jax.jit(train_step, donate_argnums=0)

    def step(self, inputs: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
        """Trains on groups of crops and masks; the loss, and the norm of all gradients before clipping."""
        self.state, metrics = jax.block_until_ready(self.jitted(self.state, *inputs))
        norms = jnp.stack([metrics["gradient_norm_backbone"], metrics["gradient_norm_dino_head"]])
        return metrics["loss"], jnp.linalg.norm(norms)

    def parameters(self) -> dict[str, np.ndarray]:
        """Student and teacher as `dino_work.differences` takes them."""
        return _networks(self.graphdef, self.state)


def _networks(graphdef: Any, state: Any) -> dict[str, np.ndarray]:
    """Parameters of student and teacher under official names."""
    found = {}
    for which in ("student", "teacher"):
        network = to_torch(nnx.merge(graphdef, getattr(state, which)))
        found |= {f"{which}.{name}": array for name, array in network.items()}
    return found


def build(model: Model) -> DINO:
    """Our network with random parameters, the same at every call."""
    return DINO(*_parts(model))


def build_dinov2(model: Model) -> DINOv2:
    """Our network for DINOv2 with random parameters, the same at every call; its one head serves patches too."""
    return DINOv2(*_parts(model, norm_last_layer=False, init_values=LAYER_SCALE, family="dinov2"))


def _parts(model: Model, *, norm_last_layer: bool = True, **config: Any) -> tuple[VisionTransformer, DINOHead]:
    words = dataclasses.asdict(model)
    head = {name: words.pop(name) for name in ("hidden_dim", "bottleneck_dim")} | {"out_dim": words.pop("prototypes")}
    rngs = nnx.Rngs(0)
    backbone = VisionTransformer(ViTConfig(**words, **config), rngs=rngs)
    return backbone, DINOHead(model.embed_dim, **head, norm_last_layer=norm_last_layer, rngs=rngs)


def most_masked(row: DINOv2Row, batch: int) -> int:
    """What a training with DINOv2's masks would give `make_dinov2_train_step`."""
    masking = BlockMasking(row.side, row.side, mask_sample_probability=MASKED_CROPS, mask_ratio_min_max=MASK_SHARES)
    return masking.most_masked(GLOBAL_CROPS * batch)


def prepare_step(row: str, start: str, raw: bool = False) -> Prepared:
    """Our step; whoever comes first writes initial parameters and the results of the first steps to a folder.

    Args:
        row: of `dino_work.ROWS`.
        start: the folder.
        raw: begin with uint8 images instead of ready crops.
    """
    work, gpu = ROWS[row], on_gpu(Path(start))
    trainer, first = _proved(
        Path(start),
        lambda: build(work.model),
        lambda model: Trainer(model, Recipe()),
        random_crops(work, GPU_PROOF_BATCH if gpu else work.batch),
    )
    dtype, options = (jnp.bfloat16, {"compute_dtype": jnp.bfloat16}) if gpu else (jnp.float32, {})
    if gpu or trainer is None:  # on a CPU the program of the proof is the one to be timed
        crops = MultiCropConfig(work.model.img_size, work.local_size) if raw else None
        trainer, first = Trainer(build(work.model), Recipe(), crops=crops, **options), 0.0
    if raw:
        inputs = jax.device_put(pictures(work.batch, work.model.img_size))
    else:
        inputs = [jax.device_put(group.astype(dtype)) for group in random_crops(work, work.batch)]
    return timed(work, lambda: trainer.step(inputs), dtype, first)


def prepare_dinov2_step(row: str, start: str) -> Prepared:
    """Our step of DINOv2, in the way of `prepare_step`; `row` is of `dinov2_work.DINOV2_ROWS`."""
    work, gpu = DINOV2_ROWS[row], on_gpu(Path(start))

    def trainer_of(model: DINOv2, batch: int, **options: Any) -> DINOv2Trainer:
        return DINOv2Trainer(model, DINOv2Recipe(), most_masked=most_masked(work, batch), **options)

    def inputs(batch: int, dtype: DTypeLike) -> tuple[list[jax.Array], jax.Array]:
        crops = [jax.device_put(group.astype(dtype)) for group in random_crops(work, batch)]
        return crops, jax.device_put(random_masks(work, batch))

    few = GPU_PROOF_BATCH if gpu else work.batch
    trainer, first = _proved(
        Path(start),
        lambda: build_dinov2(work.model),
        lambda model: trainer_of(model, few),
        inputs(few, jnp.float32),
    )
    dtype, options = (jnp.bfloat16, {"compute_dtype": jnp.bfloat16}) if gpu else (jnp.float32, {})
    if gpu or trainer is None:
        trainer, first = trainer_of(build_dinov2(work.model), work.batch, **options), 0.0
    batch = inputs(work.batch, dtype)
    return timed(work, lambda: trainer.step(batch), dtype, first)


def on_gpu(folder: Path) -> bool:
    """Whether there is a GPU; several processes share it, and the control compiles what we did."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    gpu = jax.default_backend() == "gpu"
    if gpu:
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    return gpu


def _proved(folder: Path, build: Callable[[], Any], start: Callable[[Any], Any], inputs: Any) -> tuple[Any, float]:
    """Whoever comes first writes initial parameters and the results of the first steps for the others.

    Returns the trainer and the seconds of its first step, or None and 0 for those who come later.
    """
    if (folder / "weights.npz").exists():
        return None, 0.0
    model = build()
    np.savez(folder / "weights.npz", **to_torch(model))
    trainer = start(model)
    with jax.default_matmul_precision("highest" if jax.default_backend() == "gpu" else None):
        results, first = first_steps(trainer, inputs)
    np.savez(folder / "ours.npz", **results)
    return trainer, first


def timed(work: Any, run: Callable[[], Any], dtype: DTypeLike, first: float) -> Prepared:
    """`run`, warmed up, beside the rate of products in `dtype`; `first` is how long the first run took, if longer."""
    left, right = (jax.random.normal(jax.random.key(0), shape, dtype) for shape in work.product)
    product = jax.jit(jnp.matmul)
    prepared = warmed_up(run, matmul_tflops=product_tflops(work, lambda: product(left, right).block_until_ready()))
    if jax.default_backend() == "gpu":
        prepared.info["gpu_peak_mib"] = jax.devices()[0].memory_stats()["peak_bytes_in_use"] >> 20
    return dataclasses.replace(prepared, compile_seconds=max(prepared.compile_seconds, first - prepared.unit_seconds))


def prepare_crops(row: str, start: str) -> Prepared:
    """Our augmentation; writes the drawn views and the crops of a few images to a folder, for Pillow to repeat."""
    work = ROWS[row]
    config = MultiCropConfig(global_size=work.global_size, local_size=work.local_size)
    images, key = jax.device_put(pictures(work.batch, work.source)), jax.random.key(0)
    crops = jax.jit(lambda images: multi_crop(key, images, config))
    prepared = warmed_up(lambda: jax.block_until_ready(crops(images)))
    few = PROOF_IMAGES
    views = draw_views(key, jnp.arange(few), work.source, work.source, config)
    arrays = {f"{kind}_{name}": a for kind, v in zip(("global", "local"), views) for name, a in v._asdict().items()}
    globals_, locals_ = (np.asarray(group[:, :few]) for group in crops(images))
    np.savez(Path(start) / "crops.npz", global_crops=globals_, local_crops=locals_, **arrays)
    return prepared
