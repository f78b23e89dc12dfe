"""One module as another of some class, with the same arrays. Nothing here computes."""

from typing import Any

import mlx.nn as nn


def become(module: Any, cls: type[nn.Module]) -> Any:
    """A module of class `cls` with the arrays, attributes and mode of `module`, which does not change."""
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    dict.update(layer, module)
    layer.__dict__.update(
        {key: set(value) if isinstance(value, set) else value for key, value in module.__dict__.items()}
    )
    return layer
