"""What Hugging Face's `config.json` and `preprocessor_config.json` say of the weights beside them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.dinov3 import hugging_face
from dinojax.errors import UserError
from dinojax.models.config import ViTConfig
from dinojax.models.layers import SwiGLUFFN, swiglu_hidden_dim
from dinojax.models.vit import VisionTransformer

FAMILIES = {"dinov2": "dinov2", "dinov2_with_registers": "dinov2", "vit": "dino", hugging_face.MODEL_TYPE: "dinov3"}
"""Hugging Face's `model_type` → family of the model."""
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Interpolation → Pillow's number of the filter, which Hugging Face calls `resample`."""
_LARGEST_RATIO = 1024
_EPSILON = 1e-6  # of every LayerNorm in DINO and DINOv2
_ONNX_FOLDER = "onnx"  # where repositories keep their exports, below the folder of the settings


def read_settings(path: str | Path) -> dict[str, Any]:
    """Hugging Face's `config.json` in or next to `path`; {} without one.

    Raises:
        UserError: the file is damaged.
    """
    document = _read(path, "config.json")
    return document if isinstance(document.get("model_type"), str) else {}


def num_heads_beside(path: str | Path) -> int | None:
    """The number of attention heads in the `config.json` in or next to `path`, or None.

    Raises:
        UserError: the file is damaged, or its number is not one.
    """
    num_heads = _read(path, "config.json").get("num_attention_heads")
    if num_heads is None:
        return None
    if not _is_whole(num_heads) or num_heads < 1:
        raise UserError(f"{path}: config.json has num_attention_heads = {num_heads!r:.40}, not a positive whole number")
    return num_heads


def raise_unless_computed(path: str | Path, model: VisionTransformer) -> None:
    """Refuses weights whose `config.json` asks for something that `model` does not compute.

    Smaller LayerNorm epsilons pass: Hugging Face's copies of DINO say 1e-12, but DINO was trained with 1e-6.

    Raises:
        UserError: names the setting, its value, and what the model computes with.
    """
    settings = read_settings(path)
    if not settings:
        return
    if (settings["model_type"] == hugging_face.MODEL_TYPE) != (model.config.family == "dinov3"):
        kinds = " or ".join(kind for kind, family in FAMILIES.items() if family == model.config.family)
        raise UserError(
            f"{path}: config.json has model_type = {settings['model_type']!r:.40}, and the model computes with {kinds} "
            "as the weights beside it ask; download both again"
        )
    if model.config.family == "dinov3":
        for name, wanted in hugging_face.computed(settings, model.config).items():
            raise UserError(
                f"{path}: config.json has {name} = {settings.get(name)!r:.40}, and the model computes with {wanted!r}: "
                "these are not weights of DINOv3 as published"
            )
        _raise_unless_sizes(path, settings, model)
        return
    epsilon, act = settings.get("layer_norm_eps", _EPSILON), settings.get("hidden_act", "gelu")
    swiglu = model.config.ffn_layer == "swiglufused"
    checks = {
        "model_type": (settings["model_type"] in FAMILIES, " or ".join(FAMILIES)),
        "layer_norm_eps": (_is_number(epsilon) and 0 <= epsilon <= _EPSILON * 1.001, f"{_EPSILON:g}"),
        "hidden_act": (act == "gelu" or swiglu, "'gelu'"),  # the gate of SwiGLU is always SiLU
        "qkv_bias": (settings.get("qkv_bias", model.config.qkv_bias) is model.config.qkv_bias, model.config.qkv_bias),
    }
    for name, (holds, computed) in checks.items():
        if not holds:
            raise UserError(
                f"{path}: config.json has {name} = {settings.get(name)!r:.40}, and the model computes with {computed}: "
                "these are not weights of DINO or DINOv2 as published"
            )
    _raise_unless_sizes(path, settings, model)


def _raise_unless_sizes(path: str | Path, settings: Mapping[str, Any], model: VisionTransformer) -> None:
    for name, (given, found) in _sizes(settings, model).items():
        if given != found:
            raise UserError(
                f"{path}: config.json has {name} = {settings[name]!r:.40}, and the weights beside it have {found}; "
                "download both again"
            )


def _sizes(settings: Mapping[str, Any], model: VisionTransformer) -> dict[str, tuple[Any, Any]]:
    """Setting → what it says and what the weights have, for sizes that shapes determine, or nearly."""
    config = model.config
    hidden = _hidden_width(model)
    found = {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_channels": config.in_chans,
        "num_register_tokens": config.num_register_tokens,
        "use_swiglu_ffn": config.ffn_layer == "swiglufused",
        "head_dim": config.embed_dim // config.num_heads,
        "patch_size": config.patch_size,
        "intermediate_size": hidden,
    }
    given = {name: settings[name] for name in found if settings.get(name) is not None}
    if "patch_size" in given:
        given["patch_size"] = _square(given["patch_size"])
    compared: dict[str, tuple[Any, Any]] = {name: (value, found[name]) for name, value in given.items()}
    if settings.get("image_size") is not None and config.family != "dinov3":  # which has no table of a size
        side = _square(settings["image_size"])
        whole = side // config.patch_size * config.patch_size if _is_whole(side) else side
        compared["image_size"] = (whole, config.img_size)
    ratio = settings.get("mlp_ratio")
    if ratio is not None and not (_is_number(ratio) and _width_of(ratio, config) == hidden):
        compared["mlp_ratio"] = (ratio, f"{hidden} hidden channels")
    return compared


def _hidden_width(model: VisionTransformer) -> int:
    """The number of hidden channels of the feed-forward networks."""
    mlp = model.blocks[0].mlp
    return (mlp.w3 if isinstance(mlp, SwiGLUFFN) else mlp.fc2).kernel.shape[0]


def _width_of(ratio: float, config: ViTConfig) -> int:
    """The number of hidden channels that `transformers` makes of `mlp_ratio`."""
    if not 0 < ratio <= _LARGEST_RATIO:
        return 0
    return swiglu_hidden_dim(config.embed_dim, ratio) if config.ffn_layer != "mlp" else int(config.embed_dim * ratio)


def _square(size: Any) -> Any:
    """The side of a square that is given by one number or two equal ones; other values come back as they are."""
    is_square = isinstance(size, list) and len(size) == 2 and size[0] == size[1]
    return size[0] if is_square else size


def preprocessing_beside(path: str | Path) -> dict[str, Any]:
    """The `mean`, `std`, `image_size` and `interpolation` of the `preprocessor_config.json` in or next to `path`.

    Returns:
        Those that the file states; {} without a file.

    Raises:
        UserError: the file asks for something that is not a mean and a deviation of pixels between 0 and 1, or for a
            way of resizing that dinojax does not have.
    """
    document = _read(path, "preprocessor_config.json")
    if not document:
        return {}
    found: dict[str, Any] = {}
    scaled = document.get("do_rescale", True) is True and _is_close(document.get("rescale_factor", 1 / 255), 1 / 255)
    if not scaled:
        raise UserError(f"{path}: preprocessor_config.json does not rescale pixels by 1/255, which the model needs")
    if document.get("do_normalize", True) is not True:
        found |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    elif "image_mean" in document or "image_std" in document:
        mean, std = (_of_channels(document.get(name)) for name in ("image_mean", "image_std"))
        if mean is None or std is None or min(std) <= 0:
            raise UserError(
                f"{path}: image_mean = {document.get('image_mean')!r:.60} and image_std = "
                f"{document.get('image_std')!r:.60} in preprocessor_config.json are not three numbers each"
            )
        found |= {"mean": mean, "std": std}
    if document.get("resample") is not None:
        found["interpolation"] = _interpolation(path, document["resample"])
    cropped = document.get("do_center_crop", "crop_size" in document)
    side = _side(document.get("crop_size" if cropped else "size"))
    return found | ({"image_size": side} if side else {})


def _interpolation(path: str | Path, resample: Any) -> str:
    """Pillow's number of a filter → its name."""
    names = {number: name for name, number in FILTERS.items()}
    if not _is_whole(resample) or resample not in names:
        known = ", ".join(f"{number} ({name})" for number, name in names.items())
        raise UserError(
            f"{path}: preprocessor_config.json has resample = {resample!r:.40}, and dinojax resizes with {known}"
        )
    return names[resample]


def _side(size: Any) -> int | None:
    """The side of a square in Hugging Face's ways of writing a size, or None."""
    if isinstance(size, dict):
        sides = {size.get("height"), size.get("width")} if "height" in size else {size.get("shortest_edge")}
        size = sides.pop() if len(sides) == 1 else None
    return size if _is_whole(size) and size > 0 else None


def _of_channels(values: Any) -> list[float] | None:
    is_triple = isinstance(values, list) and len(values) == 3 and all(map(_is_number, values))
    return [float(value) for value in values] if is_triple else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_close(value: Any, wanted: float) -> bool:
    return _is_number(value) and abs(value - wanted) < 1e-3 * wanted


def _read(path: str | Path, name: str) -> dict[str, Any]:
    """A JSON object in or next to `path`; {} if there is none."""
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    places = [folder, folder.parent] if folder.name == _ONNX_FOLDER else [folder]
    file = next((place / name for place in places if (place / name).is_file()), None)
    if file is None:
        return {}
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); download it again") from error
    return document if isinstance(document, dict) else {}
