"""Cached values and codes, and the states of tensors that they depend on."""
