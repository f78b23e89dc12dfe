"""The law of learned scales (`qkit.reference.learned`) in torch; arrays only, no gradients of torch's."""

import math

import torch
from torch import Tensor

from qkit.element import MAX_SCALE_CODE, MIN_SCALE, MIN_SCALE_CODE
from qkit.grid import Grid
from qkit.reference.learned import FARTHEST, factor
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.scale_rules import amax, poison, round_to_bfloat16


def initial(w: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """The parameters that give `w` the values that the grid's own rule gives it."""
    x = rounding.group(w, grid)
    if grid.element.kind == "float":
        return (torch.zeros(x.shape[:-1], device=w.device),)
    return (rounding.symmetric_scale(x, grid),) if grid.symmetric else rounding.asymmetric_scale(x, grid.element)


def steps(w: Tensor, grid: Grid, p: Tensor, zero: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The fp32 step of each group of `w`, and its zero point under `minmax`: the parameters as they are used."""
    if grid.element.kind == "float":
        return _offset_steps(rounding.group(w, grid), grid, p), None
    s = round_to_bfloat16(p)
    if grid.scale == "signed":
        s = torch.where(s.abs() < MIN_SCALE, torch.where(p < 0, -MIN_SCALE, MIN_SCALE), s)
    else:
        s = s.clamp_min(MIN_SCALE)
    s = s + poison(p)
    if zero is None:
        return s, None
    return s, torch.round(zero).clamp(0, grid.element.levels) + poison(zero)


def values_alone(w: Tensor, grid: Grid, p: Tensor, *more: Tensor) -> Tensor:
    """The values of `learned.alone` of `w` [..., n] in its type, with the gradient of `learned.gradient_alone`.

    Args:
        p: the scales that train.
        more: zero points under `minmax`; and the same parameters as they found the codes.
    """
    with torch.no_grad():
        s, z = steps(w, grid, *more[len(more) // 2 :])
        v = rounding.group(rounding.rounded(w.to(torch.float32), grid, scales=s, zeros=z), grid)
        units = torch.round(v / rounding.each(s))  # a compiler may divide less exactly
        new, _ = steps(w, grid, p.detach(), *more[: len(more) // 2])
    scales = new + (p - p.detach()) * factor(grid, tuple(w.shape))
    return (units * rounding.each(scales)).reshape(w.shape).to(w.dtype)


def to_parameters(w: Tensor, gradient: Tensor, inside: Tensor, grid: Grid, s: Tensor, z: Tensor | None) -> list[Tensor]:
    """The gradients of the parameters, where the values of `w` have `gradient` and `w` is not clipped `inside`."""
    x, g, within = (
        rounding.group(w, grid),
        rounding.group(gradient, grid),
        inside.reshape(grid.group_shape(tuple(w.shape))),
    )
    v = rounding.group(rounding.rounded(w.to(torch.float32), grid, scales=s, zeros=z), grid)
    scaled = factor(grid, tuple(w.shape))
    moved = (g * (v - torch.where(within, x, 0.0))).sum(dim=-1) * scaled
    if grid.element.kind == "float":
        return [moved * math.log(2)]
    if z is None:
        return [moved / s]
    return [moved / s, torch.where(within, 0.0, g).sum(dim=-1) * -s * scaled]


def _offset_steps(x: Tensor, grid: Grid, offset: Tensor) -> Tensor:
    peak = amax(x)
    whole = torch.round(offset).clamp(-FARTHEST, FARTHEST).to(torch.int32)
    c = (rounding.scale_code(peak, grid).to(torch.int32) + whole).clamp(MIN_SCALE_CODE, MAX_SCALE_CODE)
    return rounding.power(c) + poison(peak) + poison(offset)
