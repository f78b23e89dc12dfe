"""Compiled code for MLX, and the choice between it and the plain arithmetic."""
