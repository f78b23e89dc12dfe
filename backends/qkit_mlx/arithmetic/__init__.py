"""The law in MLX, function by function: arrays only."""
