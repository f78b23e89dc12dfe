"""Whole torch models: their layers, and how to build one from a configuration."""
