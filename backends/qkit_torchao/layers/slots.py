"""The activation grids of converted layers: dynamic, or on static scales, which are buffers of the layer."""

from typing import Any

from torch import Tensor

from qkit.grid import Grid
from qkit_torchao.arithmetic import packing
from qkit_torchao.layers import straight_through


def slot(module: Any, x: Tensor, name: str, grid: Grid | None) -> Tensor:
    """`x` on the grid of the slot `name`, `input` or `output`, if there is one."""
    if grid is None:
        return x
    return straight_through.fake_quantize(x, grid, **static_scales(module, name, grid))


def static_scales(module: Any, name: str, grid: Grid) -> dict[str, Any]:
    """`scales` and `zeros` for `fake_quantize`, where the slot `name` is static; empty where it is dynamic."""
    if module.rule.range == "dynamic":
        return {}
    scales = {"scales": module.get_buffer(f"{name}_scale")}
    if grid.symmetric:
        return scales
    return {**scales, "zeros": packing.unshift(module.get_buffer(f"{name}_zero_point"), grid.element)}
