"""`qkit/reference/ranges.py` in MLX: the range of the values that a layer has seen, and its static scales. Arrays only."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from qkit.element import AVERAGE
from qkit.grid import Grid
from qkit_mlx.arithmetic import packing, rounding
from qkit_mlx.arithmetic.scale_rules import amax, poison

EMPTY = (float("inf"), float("-inf"))  #: the range before any value was seen


def extremes(x: mx.array) -> mx.array:
    """The lowest and the highest of the numbers in `x`, float32 [2]; without gradients."""
    x = mx.stop_gradient(x).astype(mx.float32)
    return mx.stack([x.min(), x.max()])


def wider(seen: mx.array, extremes: mx.array) -> mx.array:
    """The range `seen`, widened to `extremes`; `seen` itself if one of these is not finite."""
    widened = mx.stack([mx.minimum(seen[0], extremes[0]), mx.maximum(seen[1], extremes[1])])
    return mx.where(mx.isfinite(extremes).all(), widened, seen)


def averaged(seen: mx.array, extremes: mx.array) -> mx.array:
    """The running average of the range `seen` and `extremes`; `extremes` if `seen` is empty.

    `seen` itself if one of `extremes` is not finite.
    """
    average = mx.where(seen[0] > seen[1], extremes, seen + AVERAGE * (extremes - seen))
    return mx.where(mx.isfinite(extremes).all(), average, seen)


def static_scales(seen: mx.array, grid: Grid, *, name: str) -> dict[str, mx.array]:
    """The law's `static_scales` of one range `seen`, of the slot `name`; NaN if the range is empty."""
    q = rounding.quantize(seen, grid)
    stored = {f"{name}_scale": rounding.scale_values(q) + poison(amax(seen))}
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
