"""Weight files into named tensors: PyTorch, safetensors, ONNX; nothing that a file holds is run."""
