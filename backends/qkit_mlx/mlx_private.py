"""Every private name of MLX that this engine reads, as of MLX 0.32. Prepared layers also override these two."""

import sys
from collections.abc import Callable
from operator import attrgetter, methodcaller

import mlx.nn as nn

frozen_names: Callable[[nn.Module], set[str]] = attrgetter(
    "_no_grad"
)  #: of a module's own arrays; the set may be edited


def set_training_mode(module: nn.Module, training: bool) -> None:
    """Sets the mode of `module` alone; `Module.train` also sets the modes of the modules below it."""
    methodcaller("_set_training_mode", training)(module)


def is_read_by(module: str) -> bool:
    """Whether the property that asks is read by code of the Python module called `module`. Nothing else tells readers apart."""
    return bool(sys._getframe(2).f_globals.get("__name__") == module)
