"""`qkit/reference/learned.py` in MLX: learned scales, zero points and exponent offsets, with their gradients. Arrays only."""

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx

from qkit.element import MAX_SCALE_CODE, MIN_SCALE, MIN_SCALE_CODE
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit.reference.learned import FARTHEST, factor
from qkit_mlx.arithmetic import rounding
from qkit_mlx.arithmetic.scale_rules import amax, poison, round_to_bfloat16


def initial(w: mx.array, grid: Grid) -> tuple[mx.array, ...]:
    """The parameters that give `w` the values that the grid's own rule gives it."""
    x = rounding.group(w, grid)
    if grid.element.kind == "float":
        return (mx.zeros(x.shape[:-1]),)
    if grid.symmetric:
        return (rounding.symmetric_scale(x, grid),)
    return rounding.asymmetric_scale(x.min(axis=-1), x.max(axis=-1), grid.element)


def steps(w: mx.array, grid: Grid, p: mx.array, zero: mx.array | None = None) -> tuple[mx.array, mx.array | None]:
    """The fp32 step of each group of `w`, and its zero point under `minmax`, as rounding uses them.

    Args:
        p: the learned scales, or the learned offsets of a float grid; shaped like the grid's scales.
        zero: the learned zero points under `minmax`.
    """
    if grid.element.kind == "float":
        return _offset_steps(rounding.group(w, grid), grid, p), None
    s = round_to_bfloat16(p)
    if grid.scale == "signed":
        s = mx.where(mx.abs(s) < MIN_SCALE, mx.where(p < 0, -MIN_SCALE, MIN_SCALE), s)
    else:
        s = mx.maximum(s, MIN_SCALE)
    s = s + poison(p)
    if zero is None:
        return s, None
    return s, mx.clip(mx.round(zero), 0, grid.element.levels) + poison(zero)


def quantize(w: mx.array, grid: Grid, *parameters: mx.array) -> QTensor[mx.array]:
    """Codes of finite `w` on the scales that finite `parameters` give."""
    x = rounding.group(w, grid)
    s, z = steps(w, grid, *parameters)
    if z is not None:
        q = rounding.asymmetric_codes(x, rounding.each(s), rounding.each(z), grid.element).astype(mx.uint8)
        return QTensor(q.reshape(w.shape), s, grid, dtype_of(w), zeros=z.astype(mx.uint8))
    if grid.element.kind == "integer":
        q = rounding.symmetric_codes(x, rounding.each(s), grid.element).astype(mx.int8)
        return QTensor(q.reshape(w.shape), s, grid, dtype_of(w))
    c = rounding.exponent(s)
    return QTensor(rounding.float_codes(x, c, grid.element).reshape(w.shape), c, grid, dtype_of(w))


def fake_quantize(w: mx.array, grid: Grid, *parameters: mx.array) -> mx.array:
    """The values [..., n] of `w` on the scales that `parameters` give, in the type of `w`; its gradient is `gradients`."""

    def forward(*primals: mx.array) -> mx.array:
        # MLX also asks for the jvp of the operations inside, and operations on bit patterns have none.
        w, *ranges = map(mx.stop_gradient, primals)
        s, z = steps(w, grid, *ranges)
        return rounding.fake_quantize(w, grid, scales=s, zeros=z)

    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        w, *ranges = primals
        return gradients(w, grid, *ranges, gradient=cotangent)

    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    return function(w, *parameters)  # type: ignore[no-any-return]


def quantize_alone(w: mx.array, grid: Grid, p: mx.array, *more: mx.array) -> QTensor[mx.array]:
    """The law's `alone`.

    Args:
        p: the scales that train.
        more: zero points under `minmax`; and the same parameters as they found the codes.
    """
    half = len(more) // 2
    return replace(quantize(w, grid, *more[half:]), scales=steps(w, grid, p, *more[:half])[0])


def values_alone(w: mx.array, grid: Grid, p: mx.array, *more: mx.array) -> mx.array:
    """The values of `quantize_alone` in the type of `w`, with the gradient of the law's `gradient_alone`."""
    q = quantize_alone(mx.stop_gradient(w), grid, *map(mx.stop_gradient, (p, *more)))
    units = rounding.group(q.codes.astype(mx.float32), grid)
    units = units if q.zeros is None else units - rounding.each(q.zeros.astype(mx.float32))
    scales = mx.stop_gradient(q.scales) + (p - mx.stop_gradient(p)) * factor(grid, tuple(w.shape))
    return (mx.stop_gradient(units) * rounding.each(scales)).reshape(w.shape).astype(w.dtype)


def gradients(w: mx.array, grid: Grid, *parameters: mx.array, gradient: mx.array) -> tuple[mx.array, ...]:
    """The gradient of `w`, in its type, and of each of `parameters`, where the quantized values have `gradient` [..., n]."""
    s, z = steps(w, grid, *parameters)
    inside = rounding.unclipped(w, grid, scales=s, zeros=z)
    to_w = rounding.masked(gradient, inside).astype(w.dtype)
    return to_w, *_to_parameters(w, gradient, inside, grid, s, z)


def _to_parameters(
    w: mx.array, gradient: mx.array, inside: mx.array, grid: Grid, s: mx.array, z: mx.array | None
) -> list[mx.array]:
    x, g = rounding.group(w, grid), rounding.group(gradient, grid)
    within = inside.reshape(grid.group_shape(tuple(w.shape)))
    v = rounding.group(rounding.fake_quantize(w.astype(mx.float32), grid, scales=s, zeros=z), grid)
    scaled = factor(grid, tuple(w.shape))
    moved = (g * (v - mx.where(within, x, 0.0))).sum(axis=-1) * scaled
    if grid.element.kind == "float":
        return [moved * math.log(2)]
    if z is None:
        return [moved / s]
    return [moved / s, mx.where(within, 0.0, g).sum(axis=-1) * -s * scaled]


def _offset_steps(x: mx.array, grid: Grid, offset: mx.array) -> mx.array:
    peak = amax(x)
    whole = mx.clip(mx.round(offset), -FARTHEST, FARTHEST).astype(mx.int32)
    c = mx.clip(rounding.scale_code(peak, grid) + whole, MIN_SCALE_CODE, MAX_SCALE_CODE)
    return rounding.power(c) + poison(peak) + poison(offset)
