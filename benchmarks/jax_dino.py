"""Our side of `benchmarks.dino_step`: the training step on ready crops or from raw pixels, and the augmentation."""

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

from benchmarks.dino_work import (
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
from benchmarks.paired import Prepared, warmed_up
from converters.torch_to_flax import to_torch
from dinojax.models.head import DINOHead
from dinojax.models.vit import VisionTransformer, ViTConfig
from dinojax.pretraining.augment import MultiCropConfig, draw_views, multi_crop
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
        found = {"center": np.asarray(self.state.center)}
        for which in ("student", "teacher"):
            network = to_torch(nnx.merge(self.graphdef, getattr(self.state, which)))
            found |= {f"{which}.{name}": array for name, array in network.items()}
        return found


def build(model: Model) -> DINO:
    """Our network with random parameters, the same at every call."""
    words = dataclasses.asdict(model)
    head = {name: words.pop(name) for name in ("hidden_dim", "bottleneck_dim")} | {"out_dim": words.pop("prototypes")}
    rngs = nnx.Rngs(0)
    return DINO(VisionTransformer(ViTConfig(**words), rngs=rngs), DINOHead(model.embed_dim, **head, rngs=rngs))


def prepare_step(row: str, start: str, raw: bool = False) -> Prepared:
    """Our step; whoever comes first writes initial parameters and the results of the first steps to a folder.

    Args:
        row: of `dino_work.ROWS`.
        start: the folder.
        raw: begin with uint8 images instead of ready crops.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the GPU
    work, folder, gpu = ROWS[row], Path(start), jax.default_backend() == "gpu"
    if gpu:  # the control compiles what we did
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    trainer, first = None, 0.0
    if not (folder / "weights.npz").exists():
        model = build(work.model)
        np.savez(folder / "weights.npz", **to_torch(model))
        trainer = Trainer(model, Recipe())
        with jax.default_matmul_precision("highest" if gpu else None):
            results, first = first_steps(trainer, random_crops(work, GPU_PROOF_BATCH if gpu else work.batch))
        np.savez(folder / "ours.npz", **results)
    dtype, options = (jnp.bfloat16, {"compute_dtype": jnp.bfloat16}) if gpu else (jnp.float32, {})
    if gpu or trainer is None:  # on a CPU the program of the proof is the one to be timed
        crops = MultiCropConfig(work.model.img_size, work.local_size) if raw else None
        trainer, first = Trainer(build(work.model), Recipe(), crops=crops, **options), 0.0
    if raw:
        inputs = jax.device_put(pictures(work.batch, work.model.img_size))
    else:
        inputs = [jax.device_put(group.astype(dtype)) for group in random_crops(work, work.batch)]
    return timed(work, lambda: trainer.step(inputs), dtype, first)


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
