"""The named recipes of DINO pretraining, for any data set; the commands say which images at which sizes."""

import dataclasses

from dinojax.pretraining.augment import MultiCropConfig
from experiments.pretraining.config import PretrainConfig

Scale = tuple[float, float]


def recipes(
    command: str, data: str, *, image_size: int, patch_size: int, scales: tuple[Scale, Scale]
) -> dict[str, PretrainConfig]:
    """small, seed, notebook, smoke and cpu, by name; the first is the command's default.

    Args:
        command: the command's name.
        data: what it learns from unless --data says otherwise.
        image_size: side of the global crops in pixels, but of `seed` and `notebook`; local crops have half of it.
        patch_size: likewise, of their patches.
        scales: likewise, the shares of the image that their global and local crops cover.
    """
    # Gani et al. (arXiv 2210.07240) on ViT-Tiny: small patches, few prototypes, their own mean and deviation.
    small = PretrainConfig(
        data=data,
        patch_size=patch_size,
        prototypes=1_024,
        norm_last_layer=False,
        crops=MultiCropConfig(
            global_size=image_size, local_size=image_size // 2, global_scale=scales[0], local_scale=scales[1]
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
    # As the notebooks report it: ViT-Tiny/16 at 128 px, 65,536 prototypes, everything scheduled.
    seed = PretrainConfig(
        data=data,
        crops=MultiCropConfig(global_size=128, local_size=64),
        epochs=300,
        command=command,
        recipe="seed",
    )
    # One notebook's own settings: two local crops, constant momentum and weight decay.
    notebook = dataclasses.replace(
        seed,
        crops=MultiCropConfig(global_size=128, local_size=64, local_crops=2, local_scale=(0.08, 0.4)),
        learning_rate=1e-4,
        weight_decay=1e-6,
        weight_decay_end=1e-6,
        teacher_momentum_end=0.996,
        recipe="notebook",
    )
    return {one.recipe: one for one in (small, seed, notebook, *_on_a_cpu(small))}


def _on_a_cpu(small: PretrainConfig) -> tuple[PretrainConfig, PretrainConfig]:
    """smoke and cpu, made from `small`."""
    # 200 steps: few tokens, the authors' learning rate, a teacher that follows within them.
    smoke = dataclasses.replace(
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
    # What two CPU cores learn in an hour or two: small patches, the batch in parts that stay in the cache.
    cpu = dataclasses.replace(
        smoke,
        max_train=None,
        max_test=None,
        patch_size=small.patch_size,
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
