"""The law (`qkit.reference`) in MLX: the same files, functions and order. Arrays only, no kernels."""
