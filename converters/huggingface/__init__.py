"""Hugging Face's side of a model: names of tensors, settings beside weights, position convention, whole folders."""
