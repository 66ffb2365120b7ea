"""DINO and DINOv2 in JAX/Flax: models, heads and the method itself, as arrays in and arrays out.

Names and rooms are imported when they are first used, so that `import dinojax` does not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dinojax.embedding import Embeddings, embed
    from dinojax.errors import UserError
    from dinojax.images import normalize, preprocess
    from dinojax.models.config import ViTConfig
    from dinojax.models.files import load, save
    from dinojax.models.head import DINOHead
    from dinojax.models.preprocessing import Preprocessing
    from dinojax.models.variants import VARIANTS
    from dinojax.models.vit import Features, VisionTransformer

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "DINOHead",
    "Embeddings",
    "Features",
    "Preprocessing",
    "UserError",
    "ViTConfig",
    "VisionTransformer",
    "embed",
    "load",
    "normalize",
    "preprocess",
    "save",
]

_MODULES = (
    "checkpoint",
    "dense",
    "finetune",
    "heads",
    "image_ops",
    "images",
    "maps",
    "models",
    "patches",
    "pretraining",
    "probes",
    "retrieval",
)
_HOMES = {"Embeddings": "embedding", "UserError": "errors", "embed": "embedding"} | dict.fromkeys(
    ("normalize", "preprocess"), "images"
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'models')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
