"""Models written for other programs: PyTorch, StableHLO, ONNX."""
