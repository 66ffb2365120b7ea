"""DINO and DINOv2 in JAX/Flax: models, heads and the method itself, as arrays in and arrays out."""

from dinojax.errors import UserError
from dinojax.models.files import load, save
from dinojax.models.head import DINOHead
from dinojax.models.variants import VARIANTS
from dinojax.models.vit import Features, VisionTransformer, ViTConfig

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "DINOHead",
    "Features",
    "UserError",
    "ViTConfig",
    "VisionTransformer",
    "load",
    "save",
]
