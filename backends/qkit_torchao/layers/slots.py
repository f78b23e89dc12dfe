"""The scales of static activations: of prepared layers from the ranges seen, of converted layers from their buffers."""

from typing import Any

import torch
from torch import Tensor, nn

from qkit.grid import Grid
from qkit_torchao.arithmetic import packing, ranges, rounding
from qkit_torchao.arithmetic.scale_rules import amax, poison
from qkit_torchao.layers import sharded, spread, straight_through
from qkit_torchao.torch_private import is_going_back


def seen_scales(layer: Any, x: Tensor, name: str, grid: Grid | None) -> dict[str, Any]:
    """`scales` and `zeros` for `fake_quantize` in a prepared layer, where the slot `name` is static; else empty.

    While the layer calibrates, its range widens to that of `x`; in training a running average moves towards it, and under FSDP2
    and DDP towards the range of the inputs of all processes.
    """
    if layer.rule.range == "dynamic" or grid is None:
        return {}
    seen = layer.get_buffer(f"{name}_range")
    averages = layer.training and layer.rule.range == "average" and not layer.calibrating
    groups = sharded.groups_of_data(layer) if averages and isinstance(layer, nn.Module) else []
    if (
        torch.compiler.is_compiling() or not is_going_back()
    ):  # a checkpoint computes again, from inputs that were counted
        if layer.calibrating and x.numel():
            seen.copy_(ranges.wider(seen, ranges.extremes(x)))
        elif averages and (x.numel() or groups):
            found = ranges.extremes(x) if x.numel() else torch.tensor(ranges.EMPTY, device=x.device)
            if groups:
                found = torch.stack(spread.reduce_extremes(found[0], found[1], groups))
            seen.copy_(torch.where(layer.gate, ranges.averaged(seen, found), seen))
    q = rounding.quantize(seen, grid)
    scales = rounding.scale_values(q) + poison(amax(seen))  # NaN, as long as nothing was seen
    return {"scales": scales, "zeros": q.zeros}


def slot(module: Any, x: Tensor, name: str, grid: Grid | None) -> Tensor:
    """`x` in a converted layer, on the grid of the slot `name`, `input` or `output`, if there is one.

    Layers that get the same input share its values, as in training, see `straight_through.shared`.
    """
    if grid is None:
        return x
    if name == "input" and module.rule.range == "dynamic":
        return straight_through.shared(x, grid, taker=module, ste="identity")
    return straight_through.fake_quantize(x, grid, **static_scales(module, name, grid))


def static_scales(module: Any, name: str, grid: Grid) -> dict[str, Any]:
    """`scales` and `zeros` for `fake_quantize` in a converted layer, where the slot `name` is static; else empty."""
    if module.rule.range == "dynamic":
        return {}
    scales = {"scales": module.get_buffer(f"{name}_scale")}
    if grid.symmetric:
        return scales
    return {**scales, "zeros": packing.unshift(module.get_buffer(f"{name}_zero_point"), grid.element)}
