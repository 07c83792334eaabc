"""The device path: the engine's forward pass on an NVIDIA GPU, or on CPU tensors as its twin."""
