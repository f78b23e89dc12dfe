"""Static activations: the range that a layer has seen, and the scales that follow from it. Arrays only."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from qkit.element import AVERAGE
from qkit.grid import Grid
from qkit_mlx.arithmetic import packing, rounding


def unseen() -> mx.array:
    """The range [2] of nothing: lowest and highest value."""
    return mx.array([float("inf"), float("-inf")])


def widened(known: mx.array, x: mx.array) -> mx.array:
    """The range of `known` and `x`; that of `known` where an extreme of `x` is not finite, or `x` is empty."""
    if not x.size:
        return known
    seen = _seen(x)
    wider = mx.stack([mx.minimum(known[0], seen[0]), mx.maximum(known[1], seen[1])])
    return mx.where(mx.isfinite(seen).all(), wider, known)


def averaged(known: mx.array, x: mx.array) -> mx.array:
    """`known` moved a little towards the range of `x`, the first time all the way; `known` where `widened` leaves it."""
    if not x.size:
        return known
    seen = _seen(x)
    moved = mx.where(known[0] > known[1], seen, known + AVERAGE * (seen - known))
    return mx.where(mx.isfinite(seen).all(), moved, known)


def scales_of(known: mx.array, grid: Grid, *, name: str) -> dict[str, mx.array]:
    """What `qkit.reference.ranges.static_scales` gives for the range `known` of `name`, lazily; NaN where nothing was seen."""
    q = rounding.quantize(known, grid)
    stored = {f"{name}_scale": rounding.scale_values(q) + rounding.poison(rounding.amax(known))}
    if q.zeros is not None:
        stored[f"{name}_zero_point"] = packing.signed(q.zeros, grid.element)
    return stored


def given(stored: Mapping[str, mx.array], grid: Grid, *, name: str) -> dict[str, Any]:
    """The arguments of `ops.fake_quantize` that `stored` has for `name`: none where quantization is dynamic."""
    if f"{name}_scale" not in stored:
        return {}
    if grid.symmetric:
        return {"scales": stored[f"{name}_scale"]}
    zeros = packing.unsigned(stored[f"{name}_zero_point"], grid.element)
    return {"scales": stored[f"{name}_scale"], "zeros": zeros}


def _seen(x: mx.array) -> mx.array:
    x = mx.stop_gradient(x).astype(mx.float32)
    return mx.stack([x.min(), x.max()])
