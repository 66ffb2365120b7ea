"""A backbone beside a reference file: every stored output, and which differ by too much."""

import jax
import jax.numpy as jnp
import numpy as np

from converters import from_torch
from dinojax import VisionTransformer
from tests.support.reference_files import Reference

# Largest absolute differences. In float32 those that the reference's own README asks for. In float64 what storing the
# arrays in float32 leaves, and in DINOv2 its casting to float32 while it resizes positions: its float32 resizing
# of such tables differs from its float64 one by 7.7e-7 for 9×9 entries, 1.4e-6 for 16×16 and 2.1e-6 for 37×37.
TOLERANCES = {
    ("dino", "float32"): {"pos_embed": 5e-6, "attention": 5e-6, "features": 3e-5},
    ("dinov2", "float32"): {"pos_embed": 5e-6, "attention": 5e-6, "features": 3e-5},
    ("dino", "float64"): {"pos_embed": 2e-7, "attention": 1e-7, "features": 1e-6},
    ("dinov2", "float64"): {"pos_embed": 3e-6, "attention": 1e-6, "features": 6e-6},
    # The factors of the rotation count as positions. Their coordinates and periods may have been float32.
    ("dinov3", "float32"): {"pos_embed": 5e-6, "attention": 5e-6, "features": 3e-5},
    ("dinov3", "float64"): {"pos_embed": 3e-6, "attention": 1e-6, "features": 6e-6},
}


STAGES = ("pos_embed", "rope_", "prepare_tokens", "block_", "x_prenorm", "x_", "cls", "intermediate", "last_", "pooler")


def load(reference: Reference, dtype: type) -> VisionTransformer:
    state = {name: array.astype(dtype) for name, array in reference.group("state").items()}
    return from_torch(state, config=reference.vit_config())


def outputs(model: VisionTransformer, images: jax.Array, masks: jax.Array | None, wanted: list[str]) -> dict:
    """Everything a reference file may hold for one input, under its names there."""
    found, rotation = {}, model.rotation(*images.shape[1:3])
    if rotation is None:
        found["pos_embed"] = model.interpolated_pos_embed(*images.shape[1:3])
    else:
        first_patch = 1 + model.config.num_register_tokens
        first, second = jnp.split(rotation.sin[first_patch:], 2, axis=-1)
        found["rope_cos"], found["rope_sin"] = rotation.cos[first_patch:], jnp.concatenate([-first, second], axis=-1)
    x = model._embed(images, masks)
    found["prepare_tokens"] = x
    for index, block in enumerate(model.blocks):
        x = block(x, rotation)
        found[f"block_{index}"] = x
    features = model(images, masks)
    found["cls"] = found["x_norm_clstoken"] = found["pooler_output"] = features.cls_token
    found["x_norm_regtokens"] = found["x_storage_tokens"] = features.register_tokens
    found["x_norm_patchtokens"] = features.patch_tokens
    every = (features.cls_token[:, None], features.register_tokens, features.patch_tokens)
    found["last_hidden_state"] = jnp.concatenate(every, axis=1)
    found["x_prenorm"] = features.prenorm
    layers = len({name.split("/")[0] for name in wanted if name.startswith("intermediate_")})
    if layers:
        maps = model.get_intermediate_layers(images, n=layers, reshape=True, return_class_token=True)
        for index, (patch_map, cls_token) in enumerate(maps):
            found[f"intermediate_{index}/patch_map"] = patch_map.transpose(0, 3, 1, 2)
            found[f"intermediate_{index}/clstoken"] = cls_token
            patches = patch_map.reshape(len(images), -1, cls_token.shape[-1])
            found[f"intermediate_{index}"] = jnp.concatenate([cls_token[:, None], patches], axis=1)
    attention = model.get_last_selfattention(images)
    for name in ("last_block_attention", "last_selfattention"):
        found[name], found[f"{name}_cls_query"] = attention, attention[:, :, 0]
    return {name: found[name] for name in wanted}


def deviations(model: VisionTransformer, reference: Reference, group: str) -> dict[str, float]:
    """Largest absolute difference of each stored output, in the order of the stages."""
    input_name = group.removesuffix("_masked")
    masks = jnp.asarray(reference.arrays[f"in/{input_name}_masks"]) if group.endswith("_masked") else None
    images = jnp.asarray(reference.images(input_name), model.cls_token.dtype)
    expected = reference.group(f"out/{group}")
    wanted = sorted(expected, key=lambda name: next(i for i, stage in enumerate(STAGES) if name.startswith(stage)))
    # A function of its own each time: a cached trace would not see what a near miss has planted meanwhile.
    found = jax.jit(lambda model, images, masks: outputs(model, images, masks, wanted))(model, images, masks)
    for name in wanted:
        assert found[name].shape == expected[name].shape, name
    return {name: float(np.max(np.abs(np.asarray(found[name], np.float64) - expected[name]))) for name in wanted}


def kind(name: str) -> str:
    return (
        "pos_embed" if name.startswith(("pos_embed", "rope_")) else "attention" if "attention" in name else "features"
    )


def too_large(found: dict[str, float], family: str, dtype: str = "float32") -> dict[str, float]:
    return {name: value for name, value in found.items() if not value <= TOLERANCES[family, dtype][kind(name)]}
