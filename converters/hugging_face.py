"""What Hugging Face's `config.json` and `preprocessor_config.json` say of the weights beside them."""

import json
import math
from pathlib import Path
from typing import Any

from dinojax.errors import UserError
from dinojax.models.vit import VisionTransformer

_EPSILON = 1e-6  # of every LayerNorm in DINO and DINOv2


def num_heads_beside(path: str | Path) -> int | None:
    """The number of attention heads in the `config.json` in or next to `path`, or None."""
    num_heads = _read(path, "config.json").get("num_attention_heads")
    return num_heads if isinstance(num_heads, int) and num_heads > 0 else None


def raise_unless_computed(path: str | Path, model: VisionTransformer) -> None:
    """Refuses weights whose `config.json` asks for something that `model` does not compute.

    Smaller LayerNorm epsilons pass: Hugging Face's copies of DINO say 1e-12, but DINO was trained with 1e-6.
    """
    config = _read(path, "config.json")
    if not isinstance(config.get("model_type"), str):
        return  # not Hugging Face's
    epsilon = config.get("layer_norm_eps", _EPSILON)
    checks = {
        "layer_norm_eps": (_is_number(epsilon) and 0 <= epsilon <= _EPSILON * 1.001, f"{_EPSILON:g}"),
        # The gate of SwiGLU is always SiLU.
        "hidden_act": (config.get("hidden_act", "gelu") == "gelu" or config.get("use_swiglu_ffn") is True, "'gelu'"),
        "qkv_bias": (config.get("qkv_bias", model.config.qkv_bias) is model.config.qkv_bias, model.config.qkv_bias),
    }
    for name, (holds, computed) in checks.items():
        if not holds:
            raise UserError(
                f"{path}: config.json has {name} = {config.get(name)!r:.40}, and the model computes with {computed}: "
                "these are not weights of DINO or DINOv2 as published"
            )


def preprocessing_beside(path: str | Path) -> dict[str, Any]:
    """The `mean`, `std` and `image_size` of the `preprocessor_config.json` in or next to `path`; {} without one.

    Raises:
        UserError: the file asks for something that is not a mean and a deviation of pixels between 0 and 1.
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
    cropped = document.get("do_center_crop", "crop_size" in document)
    side = _side(document.get("crop_size" if cropped else "size"))
    return found | ({"image_size": side} if side else {})


def _side(size: Any) -> int | None:
    """The side of a square in Hugging Face's ways of writing a size, or None."""
    if isinstance(size, dict):
        sides = {size.get("height"), size.get("width")} if "height" in size else {size.get("shortest_edge")}
        size = sides.pop() if len(sides) == 1 else None
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else None


def _of_channels(values: Any) -> list[float] | None:
    is_triple = isinstance(values, list) and len(values) == 3 and all(map(_is_number, values))
    return [float(value) for value in values] if is_triple else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_close(value: Any, wanted: float) -> bool:
    return _is_number(value) and abs(value - wanted) < 1e-3 * wanted


def _read(path: str | Path, name: str) -> dict[str, Any]:
    """A JSON object in or next to `path`; {} if there is none."""
    path = Path(path).expanduser()
    file = (path if path.is_dir() else path.parent) / name
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if name == "config.json":
            return {}
        raise UserError(f"{file} is damaged ({error}); download it again") from error
    return document if isinstance(document, dict) else {}
