"""The named recipes of DINO pretraining, for any data set."""

import dataclasses
from typing import Literal

from dinojax.pretraining.augment import MultiCropConfig
from experiments.pretraining.config import PretrainConfig
from experiments.runs.settings import REQUIRED, create, replace

# Shares of the image that global and local crops cover, by the size of the images.
_SCALES = {32: ((0.7, 1.0), (0.2, 0.5)), 64: ((0.5, 1.0), (0.2, 0.4))}


CONTINUED = "continued"


def recipes(command: str, data: str, image_size: Literal[32, 64]) -> dict[str, PretrainConfig]:
    """The recipes small, reported, notebook, smoke and cpu, by name.

    Args:
        command: the command's name, which names the run folder.
        data: the data set, unless --data names another one.
        image_size: side in pixels of the global crops of small, smoke and cpu.
    """
    global_scale, local_scale = _SCALES[image_size]
    # Gani et al. (arXiv 2210.07240) on ViT-Tiny: small patches, few prototypes, the images' own mean and deviation.
    small = create(
        PretrainConfig,
        data=data,
        patch_size=image_size // 8,
        prototypes=1_024,
        norm_last_layer=False,
        crops=MultiCropConfig(
            global_size=image_size, local_size=image_size // 2, global_scale=global_scale, local_scale=local_scale
        ),
        own_statistics=True,
        epochs=200,
        learning_rate=1e-4,
        warmup_epochs=30,
        warmup_teacher_temp=0.04,
        teacher_temp=0.07,
        warmup_teacher_temp_epochs=10,
        command=command,
        recipe="small",
    )
    # ViT-Tiny/16 at 128 px, 65,536 prototypes, everything scheduled.
    reported = create(
        PretrainConfig,
        data=data,
        crops=MultiCropConfig(global_size=128, local_size=64),
        epochs=300,
        command=command,
        recipe="reported",
    )
    notebook = replace(
        reported,
        crops=MultiCropConfig(global_size=128, local_size=64, local_crops=2, local_scale=(0.08, 0.4)),
        learning_rate=1e-4,
        weight_decay=1e-6,
        weight_decay_end=1e-6,
        teacher_momentum_end=0.996,
        recipe="notebook",
    )
    return {one.recipe: one for one in (small, reported, notebook, *_on_a_cpu(small))}


def general_recipes(command: str, data: str) -> dict[str, PretrainConfig]:
    """The recipes small32, small64, reported, notebook, smoke, cpu and continued, for images of any size, by name.

    Args:
        command: the command's name, which names the run folder.
        data: the data set, unless --data names another one.
    """
    at_32, at_64 = (recipes(command, data, image_size=size) for size in (32, 64))
    small = {f"small{size}": found["small"] for size, found in ((32, at_32), (64, at_64))}
    named = {name: replace(config, recipe=name) for name, config in small.items()}
    others = {name: recipe for name, recipe in at_32.items() if name != "small"}
    return named | others | {CONTINUED: _continued(command, data)}


def _continued(command: str, data: str) -> PretrainConfig:
    """The pretraining of given weights on other images, gently: few epochs, a low rate, a slow teacher."""
    return create(
        PretrainConfig,
        data=data,
        init=REQUIRED,
        heads_warmup=1,
        backbone_rate=0.1,
        crops=MultiCropConfig(global_size=224, local_size=98, global_scale=(0.32, 1.0), local_scale=(0.05, 0.32)),
        prototypes=4_096,
        epochs=10,
        batch_size=64,
        learning_rate=2e-3,
        warmup_epochs=1,
        weight_decay_end=0.04,
        teacher_momentum=0.998,
        knn_every=1,
        command=command,
        recipe=CONTINUED,
    )


def recipe_for(side: int) -> str:
    """The general recipe for images of that side in pixels: the one with the largest crops that are not enlarged."""
    return "small32" if side < 64 else "small64" if side < 128 else "reported"


def _on_a_cpu(small: PretrainConfig) -> tuple[PretrainConfig, PretrainConfig]:
    """The recipes smoke and cpu, made from `small`."""
    # 200 steps: few tokens, the authors' learning rate, a teacher that follows within them.
    smoke = replace(
        small,
        max_train=2_000,
        max_test=2_000,
        patch_size=small.crops.global_size // 4,
        depth=2,
        head_hidden_dim=512,
        crops=dataclasses.replace(small.crops, local_crops=2, blur_probabilities=(0.0, 0.0, 0.0)),
        batch_size=100,
        epochs=10,
        learning_rate=5e-4,
        warmup_epochs=1,
        weight_decay_end=0.04,
        teacher_momentum=0.99,
        teacher_temp=0.04,
        warmup_teacher_temp_epochs=0,
        knn_every=5,
        recipe="smoke",
    )
    # What two CPU cores learn in an hour or two: small patches, micro-batches that fit the cache.
    cpu = replace(
        smoke,
        max_train=None,
        max_test=None,
        patch_size=small.model.patch_size,
        embed_dim=128,
        depth=4,
        num_heads=4,
        drop_path_rate=0.0,
        crops=dataclasses.replace(smoke.crops, local_crops=4),
        batch_size=128,
        accumulation_steps=4,
        epochs=8,
        learning_rate=2e-3,
        weight_decay_end=0.1,
        knn_every=1,
        knn_images=8_000,
        recipe="cpu",
    )
    return smoke, cpu


def describe(config: PretrainConfig) -> str:
    """One line about a recipe, for `--help`."""
    sizes = f"patches of {config.model.patch_size} px in crops of {config.crops.global_size} px"
    return {
        "small": f"ViT-Tiny for small images: {sizes}, 1024 prototypes, 200 epochs",
        "reported": f"ViT-Tiny as reported for these data sets: {sizes}, 65536 prototypes, 300 epochs",
        "notebook": "As reported, but with two local crops, and constant teacher momentum and weight decay",
        "smoke": "A check that training works: two blocks, 2,000 images, 200 steps; minutes on two CPU cores",
        CONTINUED: "Given weights (--init) trained on, gently: crops of 224 px, heads warmed up first, 10 epochs",
        "cpu": f"A small transformer of four blocks: {sizes}, 8 epochs; an hour or two on two CPU cores",
    }[config.recipe.rstrip("0123456789")]
