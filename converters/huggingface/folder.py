"""A dinojax model as a folder for `transformers`: config.json, model.safetensors, preprocessor_config.json."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from converters.dinov3 import hugging_face
from converters.huggingface.names import to_hugging_face
from converters.huggingface.settings import FILTERS
from dinojax.errors import UserError
from dinojax.models.config import ViTConfig
from dinojax.models.layers import swiglu_hidden_dim
from dinojax.models.preprocessing import Preprocessing
from dinojax.models.vit import VisionTransformer

_CLASSES = {"vit": "ViTModel", "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}


def write_folder(model: VisionTransformer, state: Mapping[str, np.ndarray], folder: Path) -> None:
    """Writes a folder that `AutoModel.from_pretrained` and `AutoImageProcessor.from_pretrained` read.

    Args:
        model: gives the settings.
        state: the result of `to_torch(model)`.
        folder: that does not exist; it is written whole or not at all.

    Raises:
        UserError: the folder exists or cannot be written, or transformers has no such architecture.
    """
    raise_unless_new_folder(folder)
    documents = {"config.json": model_settings(model.config)}
    if model.config.in_chans == 3:
        documents["preprocessor_config.json"] = processor_settings(model.preprocessing)
    tensors = {
        name: np.ascontiguousarray(array, np.float32)
        for name, array in to_hugging_face(state, model.config.family).items()
    }
    tensors |= _layer_scales(model.config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            for name, document in documents.items():
                (partial / name).write_text(json.dumps(document, indent=2) + "\n")
            partial.chmod(0o755)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder} could not be written ({error}); make room or name another folder") from error


def raise_unless_new_folder(folder: Path) -> None:
    """Refuses a folder or file that exists."""
    if folder.exists():
        raise UserError(f"{folder} exists; remove it or name another folder with --out")


def model_settings(config: ViTConfig) -> dict[str, Any]:
    """Hugging Face's `config.json`.

    Raises:
        UserError: transformers has no such architecture.
    """
    width = swiglu_hidden_dim(config.embed_dim, config.mlp_ratio)
    hidden = width if config.ffn_layer != "mlp" else int(config.embed_dim * config.mlp_ratio)
    if config.family == "dinov3":
        return hugging_face.model_settings(config, hidden)
    kind = _model_type(config)
    settings: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": config.img_size,
        "patch_size": config.patch_size,
        "num_channels": config.in_chans,
        "qkv_bias": config.qkv_bias,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if kind == "vit":
        return settings | {"intermediate_size": hidden}
    if config.mlp_ratio != round(config.mlp_ratio):
        raise UserError(
            f"transformers' DINOv2 takes a whole number of hidden channels per channel, and this model has mlp_ratio "
            f"{config.mlp_ratio:g}: --to torch or --to onnx writes it"
        )
    settings |= {"mlp_ratio": round(config.mlp_ratio), "use_swiglu_ffn": config.ffn_layer == "swiglufused"}
    settings |= {"layerscale_value": 1.0, "drop_path_rate": 0.0}
    return settings | ({"num_register_tokens": config.num_register_tokens} if config.num_register_tokens else {})


def processor_settings(preprocessing: Preprocessing) -> dict[str, Any]:
    """Hugging Face's `preprocessor_config.json`, for arrays equal to those of `dinojax.preprocess(size=None)`."""
    side = preprocessing.image_size
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": FILTERS[preprocessing.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def _model_type(config: ViTConfig) -> str:
    if config.family == "dino":
        if config.init_values is not None or config.num_register_tokens or config.ffn_layer != "mlp":
            raise UserError(
                "transformers' ViT has no LayerScale, registers or SwiGLU, and this model of family 'dino' has: "
                "--to torch or --to onnx writes it"
            )
        return "vit"
    return "dinov2_with_registers" if config.num_register_tokens else "dinov2"


def _layer_scales(config: ViTConfig) -> dict[str, np.ndarray]:
    """Factors of one for a DINOv2 without LayerScale, which transformers always has."""
    if config.family != "dinov2" or config.init_values is not None:
        return {}
    names = [f"encoder.layer.{block}.layer_scale{i}.lambda1" for block in range(config.depth) for i in (1, 2)]
    return {name: np.ones(config.embed_dim, np.float32) for name in names}
