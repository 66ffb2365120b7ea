"""Conversion of official PyTorch checkpoints to Flax modules, and back. The only code that imports torch."""

from converters.classifiers import load_classifier
from converters.pretrained import load_pretrained
from converters.torch_to_flax import from_torch, head_from_torch, to_torch

__all__ = ["from_torch", "head_from_torch", "load_classifier", "load_pretrained", "to_torch"]
