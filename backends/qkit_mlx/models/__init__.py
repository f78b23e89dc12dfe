"""Whole MLX models: finds, replaces, reads and fills their layers, and builds models from configurations."""
