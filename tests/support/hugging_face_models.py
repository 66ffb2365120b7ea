"""Small models of `transformers` in which no tensor has the value it starts with."""

from typing import Any

import numpy as np

KINDS = ("dinov2", "registers", "dino")
NATIVE = 70
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": NATIVE, "patch_size": 14}
_NAMES = {"dinov2": "Dinov2", "registers": "Dinov2WithRegisters", "dino": "ViT"}


def random_model(kind: str, *, classes: int = 0, **settings: Any) -> Any:
    """A torch module; with `classes`, one of image classification."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    sizes = _SIZES | ({"intermediate_size": 64} if kind == "dino" else {}) | settings
    if classes:
        sizes |= {"id2label": {index: f"class {index}" for index in range(classes)}}
    config = getattr(transformers, f"{_NAMES[kind]}Config")(**sizes)
    plain = {"add_pooling_layer": False} if kind == "dino" and not classes else {}
    model = getattr(transformers, f"{_NAMES[kind]}{'ForImageClassification' if classes else 'Model'}")(config, **plain)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def outputs(model: Any, images: np.ndarray) -> Any:
    """What the module returns for images "batch height width channels"."""
    import torch

    resized = {"interpolate_pos_encoding": True} if "ViT" in type(model).__name__ else {}
    with torch.no_grad():
        return model(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), **resized)


def images_of(height: int, width: int, count: int = 2) -> np.ndarray:
    """Normalised images "batch height width channels"."""
    return np.random.default_rng(height + width).standard_normal((count, height, width, 3), np.float32)
