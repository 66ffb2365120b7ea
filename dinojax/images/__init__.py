"""Photos in: decoding, resizing and normalising images for a model."""

from dinojax.images.preprocessing import normalize, preprocess

__all__ = ["normalize", "preprocess"]
