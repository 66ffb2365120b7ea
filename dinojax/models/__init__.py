"""The networks: vision transformer, projection head, the published variants, and models on disk."""

from dinojax.models.config import ViTConfig
from dinojax.models.files import load, save
from dinojax.models.head import DINOHead
from dinojax.models.preprocessing import Preprocessing
from dinojax.models.variants import VARIANTS
from dinojax.models.vit import Features, VisionTransformer

__all__ = ["VARIANTS", "DINOHead", "Features", "Preprocessing", "ViTConfig", "VisionTransformer", "load", "save"]
