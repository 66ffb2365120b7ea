"""Other people's weights: official PyTorch checkpoints in, Flax modules out. The only code that imports torch."""

from converters.pretrained import load_pretrained
from converters.torch_to_flax import from_torch, head_from_torch

__all__ = ["from_torch", "head_from_torch", "load_pretrained"]
