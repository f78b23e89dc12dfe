"""The portable directory: one model, its codes and its rules, in files that other tools open."""

from qkit.artifact.directory import load, save

__all__ = ["load", "save"]
