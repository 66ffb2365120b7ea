"""Small checkpoints under official names, written out by hand: shapes as torch keeps them."""

import io

import numpy as np

from dinojax import ViTConfig

TINY_V2 = ViTConfig(img_size=28, patch_size=14, embed_dim=64, depth=2, num_heads=1, init_values=1.0)
TINY_V1 = ViTConfig(img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=1)


def official_state(config: ViTConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors for `config` (mlp feed-forward) with the names and shapes of upstream's state dict."""
    dim, patch = config.embed_dim, config.patch_size
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + config.num_patches, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    if config.family == "dinov2":
        shapes["mask_token"] = (1, dim)
    if config.num_register_tokens:
        shapes["register_tokens"] = (1, config.num_register_tokens, dim)
    linear = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for block in range(config.depth):
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{name}.weight": (dim,), f"blocks.{block}.{name}.bias": (dim,)}
        for name, shape in linear.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        if config.init_values is not None:
            shapes |= {f"blocks.{block}.ls{i}.gamma": (dim,) for i in (1, 2)}
    random = np.random.default_rng(seed)
    return {name: 0.1 * random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def torch_bytes(content, **options) -> bytes:
    """What `torch.save` makes of `content`; numpy arrays in a dictionary become tensors."""
    import torch

    if isinstance(content, dict):
        content = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in content.items()}
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def assert_holds(model, state: dict[str, np.ndarray]) -> None:
    """Spot checks that `model` was made of `state`, with the transposes of linear layers and convolutions."""
    assert np.array_equal(model.blocks[1].attn.qkv.kernel[...], state["blocks.1.attn.qkv.weight"].T)
    assert np.array_equal(model.patch_embed.proj.kernel[...], state["patch_embed.proj.weight"].transpose(2, 3, 1, 0))
