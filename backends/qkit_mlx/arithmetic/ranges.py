"""`qkit/reference/ranges.py` in MLX: the range of the values that a layer has seen, and its static scales. Arrays only."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from qkit.element import AVERAGE
from qkit.grid import Grid
from qkit_mlx.arithmetic import packing, rounding
from qkit_mlx.arithmetic.scale_rules import amax, poison


def empty() -> mx.array:
    """The range [2], lowest and highest value, of no values."""
    return mx.array([float("inf"), float("-inf")])


def widened(known: mx.array, x: mx.array) -> mx.array:
    """The range of `known` and `x` together; `known` itself if an extreme of `x` is not finite, or `x` is empty."""
    if not x.size:
        return known
    seen = _extremes(x)
    wider = mx.stack([mx.minimum(known[0], seen[0]), mx.maximum(known[1], seen[1])])
    return mx.where(mx.isfinite(seen).all(), wider, known)


def averaged(known: mx.array, x: mx.array) -> mx.array:
    """The running average of `known` and the range of `x`; the range of `x` if `known` is empty.

    `known` itself where `widened` returns it.
    """
    if not x.size:
        return known
    seen = _extremes(x)
    moved = mx.where(known[0] > known[1], seen, known + AVERAGE * (seen - known))
    return mx.where(mx.isfinite(seen).all(), moved, known)


def static_scales(known: mx.array, grid: Grid, *, name: str) -> dict[str, mx.array]:
    """The law's `static_scales` of one range `known`, of the slot `name`; NaN where the range is empty."""
    q = rounding.quantize(known, grid)
    stored = {f"{name}_scale": rounding.scale_values(q) + poison(amax(known))}
    if q.zeros is not None:
        stored[f"{name}_zero_point"] = packing.signed(q.zeros, grid.element)
    return stored


def stored_scales(stored: Mapping[str, mx.array], grid: Grid, *, name: str) -> dict[str, Any]:
    """`scales` and `zeros` for `fake_quantize` of the slot `name`, from the tensors `stored`; empty if it is dynamic."""
    if f"{name}_scale" not in stored:
        return {}
    if grid.symmetric:
        return {"scales": stored[f"{name}_scale"]}
    zeros = packing.unsigned(stored[f"{name}_zero_point"], grid.element)
    return {"scales": stored[f"{name}_scale"], "zeros": zeros}


def _extremes(x: mx.array) -> mx.array:
    x = mx.stop_gradient(x).astype(mx.float32)
    return mx.stack([x.min(), x.max()])
