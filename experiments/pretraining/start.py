"""Where a pretraining starts: at random weights, or at given ones whose architecture and statistics it takes over."""

import dataclasses

from flax import nnx

from dinojax.errors import UserError
from dinojax.models.position import interpolate_pos_embed
from dinojax.models.vit import VisionTransformer
from dinojax.pretraining.augment import MultiCropConfig
from experiments.features.backbones import load_backbone
from experiments.features.extractor import fingerprint
from experiments.pretraining.config import PretrainConfig
from experiments.runs.settings import replace, require


def load_start(config: PretrainConfig) -> tuple[PretrainConfig, VisionTransformer | None]:
    """The settings completed by the method and by the weights of `--init`, and the backbone with these weights.

    Without `--init`, the backbone is None.

    Raises:
        UserError: weights that cannot be used, or not by this method, or a stage of part of a patch.
    """
    start, config = config.start, _with_kind_of_blur(config)
    if start.init is None:
        return config, None
    model = load_backbone(start.init, seed=config.run.seed, cache_dir=config.run.cache_dir).model
    if config.objective.method == "dinov2" and model.mask_token is None:
        raise UserError(
            f"--init {start.init} is a DINO model, which has no mask token for --method dinov2; continue it with "
            "--method dino, or start from DINOv2 weights"
        )
    weights = fingerprint(model)
    if start.stage is not None:
        patch = model.config.patch_size
        require(start.stage % patch == 0, "stage", start.stage, f"a multiple of the weights' patch size {patch}")
        model = with_position_table(model, start.stage)
    shape = model.config
    completed = replace(
        config,
        crops=_crops(config, model),
        patch_size=shape.patch_size,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        own_statistics=False,
        architecture=shape,
        init_fingerprint=weights,
    )
    return completed, model


def _with_kind_of_blur(config: PretrainConfig) -> PretrainConfig:
    """The settings with the kind of blur of their method, unless one is named."""
    if config.crops.mode is not None:
        return config
    mode = "v1" if config.objective.method == "dino" else "v2_paper"
    return dataclasses.replace(config, crops=dataclasses.replace(config.crops, mode=mode))


def with_position_table(model: VisionTransformer, img_size: int) -> VisionTransformer:
    """A copy whose position table is resized to images of `img_size` px, as the model would resize it in every step.

    A DINOv3 has no table, and takes images of any size as it is.
    """
    config = dataclasses.replace(model.config, img_size=img_size)
    if model.pos_embed is None:
        copied = nnx.clone(model)
        copied.config = config
        return copied
    side = img_size // config.patch_size
    table = interpolate_pos_embed(
        model.pos_embed[...], side, side, antialias=config.interpolate_antialias, offset=config.interpolate_offset
    )
    graphdef, state = nnx.split(model)
    copied = nnx.merge(graphdef, state)
    copied.pos_embed, copied.config = nnx.Param(table), config
    return copied


def _crops(config: PretrainConfig, model: VisionTransformer) -> MultiCropConfig:
    """The crops with the statistics that the weights expect, in whole patches where the model needs them."""
    crops, patch = config.crops, model.config.patch_size
    sizes = {"global_size": config.start.stage or crops.global_size, "local_size": crops.local_size}
    if model.config.family != "dino":
        whole = {name: max(1, round(size / patch)) * patch for name, size in sizes.items()}
        changed = [f"{sizes[name]} px become {whole[name]} px" for name in sizes if sizes[name] != whole[name]]
        if changed:
            print(
                f"note: crops of {' and of '.join(changed)}, because the patches of {config.start.init} are {patch} px"
            )
        sizes = whole
    mean, std = model.preprocessing.mean, model.preprocessing.std
    return dataclasses.replace(crops, **sizes, mean=tuple(mean), std=tuple(std))
