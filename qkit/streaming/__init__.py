"""Checkpoints larger than memory, quantized tensor by tensor."""
