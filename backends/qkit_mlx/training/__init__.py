"""Training on MLX: the trainer, and AdamW."""
