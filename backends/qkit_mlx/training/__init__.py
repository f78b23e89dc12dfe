"""Training on MLX."""
