"""The scales of static activations: of prepared layers from the ranges seen, of converted layers from their buffers."""

from typing import Any

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit_torchao.arithmetic import packing, ranges, rounding
from qkit_torchao.arithmetic.scale_rules import amax, poison
from qkit_torchao.layers import straight_through


def seen_scales(layer: Any, x: Tensor, name: str, grid: Grid | None) -> dict[str, Any]:
    """`scales` and `zeros` for `fake_quantize` in a prepared layer, where the slot `name` is static; else empty.

    While the layer calibrates, its range widens to that of `x`; in training a running average moves towards it.
    """
    if layer.rule.range == "dynamic" or grid is None:
        return {}
    seen = layer.get_buffer(f"{name}_range")
    if not x.numel():
        pass  # an empty tensor has no extremes
    elif layer.calibrating:
        seen.copy_(ranges.wider(seen, ranges.extremes(x)))
    elif layer.training and layer.rule.range == "average":
        seen.copy_(torch.where(layer.gate, ranges.averaged(seen, ranges.extremes(x)), seen))
    q = rounding.quantize(seen, grid)
    scales = rounding.scale_values(q) + poison(amax(seen))  # NaN, as long as nothing was seen
    return {"scales": scales, "zeros": q.zeros}


def slot(module: Any, x: Tensor, name: str, grid: Grid | None) -> Tensor:
    """`x` in a converted layer, on the grid of the slot `name`, `input` or `output`, if there is one."""
    if grid is None:
        return x
    return straight_through.fake_quantize(x, grid, **static_scales(module, name, grid))


def static_scales(module: Any, name: str, grid: Grid) -> dict[str, Any]:
    """`scales` and `zeros` for `fake_quantize` in a converted layer, where the slot `name` is static; else empty."""
    if module.rule.range == "dynamic":
        return {}
    scales = {"scales": module.get_buffer(f"{name}_scale")}
    if grid.symmetric:
        return scales
    return {**scales, "zeros": packing.unshift(module.get_buffer(f"{name}_zero_point"), grid.element)}
