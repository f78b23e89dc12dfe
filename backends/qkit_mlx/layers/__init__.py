"""MLX layers: prepared, learned, adapted and converted."""
