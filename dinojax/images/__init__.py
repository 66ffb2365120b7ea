"""Photos in: decoding, resizing and normalising images for a model."""

from dinojax.images.preprocessing import Preprocessing, normalize, preprocess

__all__ = ["Preprocessing", "normalize", "preprocess"]
