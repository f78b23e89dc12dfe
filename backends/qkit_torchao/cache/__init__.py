"""Quantized values of weights, kept until the weight changes."""
