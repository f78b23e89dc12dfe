"""Codes on the scales that a layer has learned: the law's own, of arrays that an engine gives."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.engines.layer import Layer
from qkit.engines.protocol import Backend
from qkit.errors import RangeError
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.reference import learned


def learned_codes(engine: Backend, model: Any, layer: Layer, grid: Grid) -> QTensor[NDArray[Any]]:
    """The codes of a prepared layer of `model` on the scales that it has learned. Its weight is finite.

    Raises:
        RangeError: a parameter is not finite.
    """
    tensors, parameters = engine.tensors(model), {}
    for name in learned.names(grid):
        full = f"{layer.path}.{name}" if layer.path else name
        parameters[name] = engine.to_numpy(tensors[full])
        if not np.isfinite(parameters[name]).all():
            raise RangeError(f"{full} is not finite: go back to an earlier checkpoint, and lower the learning rate")
    return learned.quantize(engine.to_numpy(engine.weight(layer.module)), grid, parameters)
