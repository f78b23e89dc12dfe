"""Picks the code for an array: a kernel that declares the grid and takes the array, else `arithmetic`. The bits are the same."""

import mlx.core as mx
import numpy as np

from qkit.element import Element
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit_mlx.arithmetic import packing, rounding
from qkit_mlx.kernels import cpu, cuda


def quantize(w: mx.array, grid: Grid) -> QTensor[mx.array]:
    """`rounding.quantize(w, grid)`; may evaluate `w`."""
    return cpu.quantize(w, grid) if cpu.takes(w, grid) else rounding.quantize(w, grid)


def fake_quantize(x: mx.array, grid: Grid) -> mx.array:
    """`rounding.fake_quantize(x, grid)`; never evaluates `x`."""
    return cuda.fake_quantize(x, grid) if cuda.takes(x, grid) else rounding.fake_quantize(x, grid)


def fake_quantize_weight(w: mx.array, grid: Grid) -> mx.array:
    """`fake_quantize` of a weight, or of each in a stack [experts, outputs, inputs].

    May evaluate `w`. Evaluating an activation would retain the graph that computes it.
    """
    w = mx.stop_gradient(w)
    if _is_stack(w, grid):
        return mx.stack([fake_quantize_weight(one, grid) for one in w])
    return cpu.fake_quantize(w, grid) if cpu.takes(w, grid) else fake_quantize(w, grid)


def unclipped_weight(w: mx.array, grid: Grid) -> mx.array:
    """`rounding.unclipped` of a weight, or of each in a stack [experts, outputs, inputs]."""
    if _is_stack(w, grid):
        return mx.stack([rounding.unclipped(one, grid) for one in w])
    return rounding.unclipped(w, grid)


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
