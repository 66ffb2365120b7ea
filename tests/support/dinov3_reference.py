"""`python -m tests.support.dinov3_reference` writes the DINOv3 files of `tests/reference`.

`DINOv3ViTModel` of `transformers` computes them in float64, coordinates and periods included. Weights are drawn by
their official names, as `tests/reference/README.md` says, and given to the module under its own, which are spelt out
here and not taken from `converters`.
"""

import json
import zlib
from typing import Any

import numpy as np
import pytest

from tests.support.dinov3_models import in_double, random_dinov3, run
from tests.support.reference_files import BUNDLED

_MODEL = {
    "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "ffn_ratio": 4,
    "ffn_layer": "mlp", "qkv_bias": True, "layerscale_init": 1.0, "norm_layer": "layernormbf16",
    "n_storage_tokens": 4, "mask_k_bias": True, "pos_embed_rope_base": 100.0,
    "pos_embed_rope_normalize_coords": "separate",
}  # fmt: skip
_SIZES = {"native": [2, 3, 32, 32], "larger": [1, 3, 64, 64], "nonsquare": [2, 3, 32, 56]}
FILES: dict[str, tuple[int, dict[str, Any], dict[str, list[int]]]] = {
    "dinov3_tiny": (301, {}, _SIZES),
    "dinov3_tiny_swiglu64": (302, {"ffn_layer": "swiglu64"}, {"native": _SIZES["native"]}),
    "dinov3_tiny_faint": (303, {"depth": 1}, {"native": _SIZES["native"]}),
}


def main() -> None:
    for name, (seed, changes, sizes) in FILES.items():
        np.savez_compressed(BUNDLED / f"{name}.npz", **arrays(name, seed, _MODEL | changes, sizes))
        print(f"{name}.npz: {(BUNDLED / f'{name}.npz').stat().st_size:,} bytes")


def arrays(name: str, seed: int, words: dict[str, Any], sizes: dict[str, list[int]]) -> dict[str, Any]:
    """Everything that a file holds."""
    state = official_state(words, seed, faint=name.endswith("faint"))
    found: dict[str, Any] = {"meta/config_json": json.dumps({"model": words, "inputs": sizes}), "meta/seed": seed}
    found |= {f"state/{key}": array for key, array in state.items()}
    with pytest.MonkeyPatch.context() as patch:
        model = in_double(_module(words, state), patch)
        for title, shape in sizes.items():
            drawn = np.random.Generator(np.random.PCG64([seed, zlib.crc32(f"in/{title}_int8".encode())]))
            pixels = np.clip(np.rint(32 * drawn.standard_normal(shape)), -127, 127).astype(np.int8)
            found[f"in/{title}_int8"] = pixels
            found |= _outputs(model, pixels, None, f"out/{title}", words)
            if title == "native" and len(sizes) > 1:
                patches = shape[2] * shape[3] // words["patch_size"] ** 2
                masks = drawn.random((shape[0], patches)) < 0.4
                found[f"in/{title}_masks"] = masks
                found |= _outputs(model, pixels, masks, f"out/{title}_masked", words)
    return found


def official_state(words: dict[str, Any], seed: int, *, faint: bool) -> dict[str, np.ndarray]:
    """The official tensors and buffers; the keys' part of `qkv.bias` is drawn too, and `bias_mask` covers it."""
    dim, patch = words["embed_dim"], words["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim), "storage_tokens": (1, words["n_storage_tokens"], dim), "mask_token": (1, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,), "norm.bias": (dim,),
    }  # fmt: skip
    hidden, linear = dim * words["ffn_ratio"], {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    if words["ffn_layer"] == "mlp":
        linear |= {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
    else:
        hidden = -(-int(hidden * 2 / 3) // 64) * 64
        linear |= {"mlp.w1": (hidden, dim), "mlp.w2": (hidden, dim), "mlp.w3": (dim, hidden)}
    for block in range(words["depth"]):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{norm}.{part}": (dim,) for part in ("weight", "bias")}
        for layer, shape in linear.items():
            shapes |= {f"blocks.{block}.{layer}.weight": shape, f"blocks.{block}.{layer}.bias": shape[:1]}
        shapes |= {f"blocks.{block}.ls{i}.gamma": (dim,) for i in (1, 2)}
    state = {key: _drawn(key, shape, seed) for key, shape in shapes.items()}
    if faint:
        state |= {k: 0.003 * v for k, v in state.items() if k.startswith(("patch_embed", "cls_token", "storage"))}
    mask = np.repeat(np.array([1, 0, 1], np.float32), dim)
    state |= {f"blocks.{block}.attn.qkv.bias_mask": mask for block in range(words["depth"])}
    head_dim = dim // words["num_heads"]
    exponents = 2 * np.arange(head_dim // 4) / (head_dim // 2)
    state["rope_embed.periods"] = words["pos_embed_rope_base"] ** exponents
    return {key: array.astype(np.float32) for key, array in state.items()}


def _drawn(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    z = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())])).standard_normal(shape)
    if "norm" in key and key.endswith("weight"):
        return 1 + 0.1 * z
    if key.endswith("gamma"):
        return 0.5 + 0.1 * z
    if key.endswith("bias"):
        return 0.05 * z
    return 0.2 * z if key.endswith(("token", "tokens")) else z / np.sqrt(np.prod(shape[1:]))


def _module(words: dict[str, Any], state: dict[str, np.ndarray]) -> Any:
    """`DINOv3ViTModel` with these tensors."""
    import torch

    gated = words["ffn_layer"] != "mlp"
    model = random_dinov3(
        hidden_size=words["embed_dim"], num_hidden_layers=words["depth"], num_attention_heads=words["num_heads"],
        intermediate_size=len(state["blocks.0.mlp.w1.bias" if gated else "blocks.0.mlp.fc1.bias"]),
        num_register_tokens=words["n_storage_tokens"], image_size=words["img_size"], patch_size=words["patch_size"],
        rope_theta=words["pos_embed_rope_base"], layer_norm_eps=1e-5, use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )  # fmt: skip
    theirs = {
        "embeddings.cls_token": state["cls_token"], "embeddings.mask_token": state["mask_token"][None],
        "embeddings.register_tokens": state["storage_tokens"],
        "embeddings.patch_embeddings.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.bias": state["patch_embed.proj.bias"],
        "norm.weight": state["norm.weight"], "norm.bias": state["norm.bias"],
    }  # fmt: skip
    mlp = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"} if gated else {"up_proj": "fc1", "down_proj": "fc2"}
    for block in range(words["depth"]):
        ours, there = f"blocks.{block}.", f"model.layer.{block}."
        for part in ("weight", "bias"):
            qkv = np.split(state[f"{ours}attn.qkv.{part}"], 3)
            theirs |= {f"{there}attention.{name}_proj.{part}": x for name, x in zip("qkv", qkv)}
            theirs[f"{there}attention.o_proj.{part}"] = state[f"{ours}attn.proj.{part}"]
            theirs |= {f"{there}mlp.{name}.{part}": state[f"{ours}mlp.{own}.{part}"] for name, own in mlp.items()}
            theirs |= {f"{there}norm{i}.{part}": state[f"{ours}norm{i}.{part}"] for i in (1, 2)}
        del theirs[f"{there}attention.k_proj.bias"]  # what the mask covers
        theirs |= {f"{there}layer_scale{i}.lambda1": state[f"{ours}ls{i}.gamma"] for i in (1, 2)}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in theirs.items()}, strict=True)
    return model


def _outputs(
    model: Any, pixels: np.ndarray, masks: np.ndarray | None, group: str, words: dict[str, Any]
) -> dict[str, np.ndarray]:
    import torch

    found = run(model, pixels.transpose(0, 2, 3, 1) / 32, masks)
    first = 1 + words["n_storage_tokens"]
    rows, columns = (side // words["patch_size"] for side in pixels.shape[2:])
    arrays = {
        "x_norm_clstoken": found["tokens"][:, 0],
        "x_storage_tokens": found["tokens"][:, 1:first],
        "x_norm_patchtokens": found["tokens"][:, first:],
    }
    if masks is None:
        arrays |= {f"block_{index}": hidden for index, hidden in enumerate(found["blocks"][1:])}
        arrays |= {"prepare_tokens": found["blocks"][0], "x_prenorm": found["blocks"][-1]}
        arrays["last_block_attention"] = found["attention"][-1]
        cos, sin = model.rope_embeddings(torch.zeros(1, 3, *pixels.shape[2:], dtype=torch.float64))
        arrays |= {"rope_cos": cos.numpy(), "rope_sin": sin.numpy()}
        with torch.no_grad():
            normed = model.norm(torch.from_numpy(found["blocks"][-1])).numpy()
        maps = normed[:, first:].transpose(0, 2, 1).reshape(len(pixels), -1, rows, columns)
        arrays |= {"intermediate_0/patch_map": maps, "intermediate_0/clstoken": normed[:, 0]}
    return {f"{group}/{name}": x.astype(np.float64 if x.size <= 400 else np.float32) for name, x in arrays.items()}


if __name__ == "__main__":
    main()
