"""Training on torch."""
