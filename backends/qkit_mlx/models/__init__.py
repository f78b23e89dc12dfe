"""Whole MLX models: their layers, and how to build one from a configuration."""
