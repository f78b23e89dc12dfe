"""qkit's C kernels on MLX's CPU arrays, in the arrays' own memory. They need evaluated arrays, unlike MLX's operations.

`qkit.native` declares the elements and scale rules of the kernels. `choose` sends every other grid to `arithmetic`.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qkit import native
from qkit.element import Element
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of

CPU = mx.Device(mx.cpu, 0)
FLOATS = (mx.float32, mx.bfloat16, mx.float16)
PATTERN = {1: np.uint8, 2: np.uint16, 4: np.float32}  #: NumPy types by bytes; NumPy has no bfloat16
FEWEST = 1 << 12  #: evaluating fewer numbers takes as long as a dozen MLX operations on them


def takes(x: mx.array, grid: Grid) -> bool:
    """Whether the kernels quantize `x` on `grid`."""
    return native.takes(grid) and reads(x)


def packs(codes: mx.array, element: Element) -> bool:
    """Whether the kernels pack `codes` of `element`."""
    return native.packs(element) and evaluate(codes)


def reads(x: mx.array) -> bool:
    """Whether the kernels read the numbers of `x`."""
    return x.dtype in FLOATS and evaluate(x)


def knows(peak: mx.array | None) -> bool:
    """Whether there is no `peak`, or its number can be known now."""
    return peak is None or _evaluated(peak)


def quantize(w: mx.array, grid: Grid, *, peak: mx.array | None = None) -> QTensor[mx.array]:
    """`rounding.quantize(w, grid, peak=peak)`."""
    return native.quantize(_memory(w), grid, dtype=dtype_of(w), peak=_number(peak)).map(mx.array)


def fake_quantize(w: mx.array, grid: Grid, *, peak: mx.array | None = None) -> mx.array:
    """`rounding.fake_quantize(w, grid, peak=peak)`."""
    values = native.fake_quantize(_memory(w), grid, dtype=dtype_of(w), peak=_number(peak))
    return mx.array(values).view(w.dtype)


def packed_codes(codes: mx.array, element: Element) -> mx.array:
    """`packing.packed_codes(codes, element)`."""
    patterns = _memory(codes)
    return mx.array(native.pack(patterns.view(np.int8) if codes.dtype == mx.int8 else patterns, element))


def magnitude(x: mx.array) -> float:
    """The largest magnitude in `x`; NaN if `x` has one."""
    return float(np.abs(native.extremes(_memory(x), dtype=dtype_of(x))).max())


def evaluate(x: mx.array) -> bool:
    """Whether the kernels can read `x`, after evaluating it: not on a GPU, not while a function is compiled or vectorized."""
    if x.size < FEWEST or not native.available() or mx.default_device() != CPU:
        return False
    return _evaluated(x)


def _evaluated(x: mx.array) -> bool:
    try:
        mx.eval(x)
    except ValueError:  # MLX has no other way to ask whether an array is a placeholder
        return False
    return True


def _number(peak: mx.array | None) -> float | None:
    return None if peak is None else float(np.array(peak))


def _memory(x: mx.array) -> NDArray[Any]:
    """`x` as NumPy, without a copy if `x` is contiguous; the bit patterns of 16-bit floats."""
    buffer = memoryview(x)  # type: ignore[arg-type]
    if not buffer.c_contiguous:
        buffer = memoryview(mx.contiguous(x))  # type: ignore[arg-type]
    return np.frombuffer(buffer, PATTERN[x.itemsize]).reshape(x.shape)
