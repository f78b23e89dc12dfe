"""Picks the code for an array: a kernel that declares the grid and takes the array, else `arithmetic`. The bits are the same."""

import mlx.core as mx
import numpy as np

from qkit.element import Element
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit_mlx.arithmetic import packing, rounding
from qkit_mlx.kernels import cpu, cuda


def quantize(w: mx.array, grid: Grid, *, peak: mx.array | None = None) -> QTensor[mx.array]:
    """`rounding.quantize(w, grid, peak=peak)`; may evaluate `w` and `peak`."""
    takes = cpu.takes(w, grid) and cpu.knows(peak)
    return cpu.quantize(w, grid, peak=peak) if takes else rounding.quantize(w, grid, peak=peak)


def fake_quantize(x: mx.array, grid: Grid, *, peak: mx.array | None = None) -> mx.array:
    """`rounding.fake_quantize(x, grid, peak=peak)`; never evaluates `x`."""
    takes = cuda.takes(x, grid)
    return cuda.fake_quantize(x, grid, peak=peak) if takes else rounding.fake_quantize(x, grid, peak=peak)


def fake_quantize_weight(w: mx.array, grid: Grid, *, peak: mx.array | None = None) -> mx.array:
    """`fake_quantize` of a weight, or of each in a stack [experts, outputs, inputs], whose peaks are [experts].

    May evaluate `w`. Evaluating an activation would retain the graph that computes it.
    """
    w = mx.stop_gradient(w)
    if _is_stack(w, grid):
        return mx.stack([fake_quantize_weight(one, grid, peak=top) for one, top in zip(w, _each(peak, w), strict=True)])
    takes = cpu.takes(w, grid) and cpu.knows(peak)
    return cpu.fake_quantize(w, grid, peak=peak) if takes else fake_quantize(w, grid, peak=peak)


def peak(w: mx.array) -> mx.array:
    """The largest magnitude in the weight `w`, float32 []; NaN if `w` has a NaN. May evaluate `w`."""
    w = mx.stop_gradient(w)
    return mx.array(cpu.magnitude(w), mx.float32) if cpu.reads(w) else mx.abs(w).max().astype(mx.float32)


def unclipped_weight(w: mx.array, grid: Grid, *, peak: mx.array | None = None) -> mx.array:
    """`rounding.unclipped` of a weight, or of each in a stack [experts, outputs, inputs], whose peaks are [experts]."""
    if _is_stack(w, grid):
        return mx.stack([rounding.unclipped(one, grid, peak=top) for one, top in zip(w, _each(peak, w), strict=True)])
    return rounding.unclipped(w, grid, peak=peak)


def packed_codes(codes: mx.array, element: Element) -> mx.array:
    """`packing.packed_codes(codes, element)`; may evaluate `codes`."""
    return cpu.packed_codes(codes, element) if cpu.packs(codes, element) else packing.packed_codes(codes, element)


def magnitude(x: mx.array) -> float:
    """The largest magnitude in `x`: 0 if `x` is empty, NaN if `x` has a NaN."""
    if cpu.reads(x):
        return cpu.magnitude(x)
    return float(np.array(mx.abs(x.astype(mx.float32)).max())) if x.size else 0.0


def _is_stack(w: mx.array, grid: Grid) -> bool:
    """Whether `w` has to be quantized expert by expert. Elsewhere a row's codes depend on no other row."""
    return w.ndim > 2 and not grid.by_rows


def _each(peak: mx.array | None, w: mx.array) -> list[mx.array | None]:
    """The peak of each expert's weight."""
    return [None] * len(w) if peak is None else list(peak)
