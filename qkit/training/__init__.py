"""The neutral loop: data and schedule as NumPy; an engine supplies the step."""

from qkit.training.data import held_out, read_bytes, windows
from qkit.training.loop import Step, train

__all__ = ["Step", "held_out", "read_bytes", "train", "windows"]
