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


def extremes_of_experts(x: mx.array, chosen: mx.array, experts: int) -> mx.array:
    """The lowest and the highest numbers that each expert sees, float32 [experts, 2]; (inf, -inf) where it sees none.

    Args:
        x: [..., rows, inputs], of the experts `chosen` [...].
    """
    x = mx.stop_gradient(x).astype(mx.float32).reshape(chosen.size, -1)
    low, high = (mx.full((experts,), bound) for bound in EMPTY)
    chosen = chosen.flatten()
    return mx.stack([low.at[chosen].minimum(x.min(axis=1)), high.at[chosen].maximum(x.max(axis=1))], axis=1)


def wider(seen: mx.array, extremes: mx.array) -> mx.array:
    """The ranges `seen` [..., 2], widened to `extremes`; `seen` itself where one of these is not finite."""
    low, high = mx.minimum(seen[..., 0], extremes[..., 0]), mx.maximum(seen[..., 1], extremes[..., 1])
    return mx.where(mx.isfinite(extremes).all(axis=-1, keepdims=True), mx.stack([low, high], axis=-1), seen)


def averaged(seen: mx.array, extremes: mx.array) -> mx.array:
    """The running average of the ranges `seen` [..., 2] and `extremes`; `extremes` where `seen` is empty.

    `seen` itself where one of `extremes` is not finite.
    """
    average = mx.where(seen[..., :1] > seen[..., 1:], extremes, seen + AVERAGE * (extremes - seen))
    return mx.where(mx.isfinite(extremes).all(axis=-1, keepdims=True), average, seen)


def static_scales(seen: mx.array, grid: Grid, *, name: str) -> dict[str, mx.array]:
    """The law's `static_scales` of one range `seen`, of the slot `name`; NaN if the range is empty."""
    q = rounding.quantize(seen, grid)
    stored = {f"{name}_scale": rounding.scale_values(q) + poison(amax(seen))}
    if q.zeros is not None:
        stored[f"{name}_zero_point"] = packing.signed(q.zeros, grid.element)
    return stored


def scales_of_experts(seen: mx.array, grid: Grid, *, name: str) -> dict[str, mx.array]:
    """`static_scales` of the ranges of all experts, [experts, 2] -> arrays [experts]."""
    q = rounding.quantize(seen, by_rows(grid))
    stored = {f"{name}_scale": rounding.scale_values(q)[:, 0] + poison(amax(seen))}
    if q.zeros is not None:
        stored[f"{name}_zero_point"] = packing.signed(q.zeros, grid.element)[:, 0]
    return stored


def by_rows(grid: Grid) -> Grid:
    """The grid of a tensor as one of rows, which may each have another expert's scale."""
    return Grid(grid.element, "row", grid.scale)


def stored_scales(stored: Mapping[str, mx.array], grid: Grid, *, name: str) -> dict[str, Any]:
    """`scales` and `zeros` for `fake_quantize` of the slot `name`, from the tensors `stored`; empty if it is dynamic."""
    if f"{name}_scale" not in stored:
        return {}
    if grid.symmetric:
        return {"scales": stored[f"{name}_scale"]}
    zeros = packing.unsigned(stored[f"{name}_zero_point"], grid.element)
    return {"scales": stored[f"{name}_scale"], "zeros": zeros}
