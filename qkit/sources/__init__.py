"""Models that other programs quantized: how they are recognized, and their weights as codes, scales and values."""
