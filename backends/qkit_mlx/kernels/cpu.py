"""qkit's C kernels on MLX's CPU arrays, in their own memory. They look at numbers now, where operations of MLX wait."""

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
PATTERN = {1: np.uint8, 2: np.uint16, 4: np.float32}  #: for NumPy, which has no bfloat16, by bytes
FEWEST = 1 << 12  #: to wait for fewer numbers takes as long as a dozen operations on them do


def takes(x: mx.array) -> bool:
    """Whether the kernels take `x`, which is evaluated: not on a GPU, and not while a function is compiled or vectorized."""
    if x.size < FEWEST or not native.available() or mx.default_device() != CPU:
        return False
    try:
        mx.eval(x)
    except ValueError:  # MLX has no other answer to whether an array is a placeholder
        return False
    return True


def quantize(w: mx.array, grid: Grid) -> QTensor[mx.array]:
    """`ops.quantize(w, grid)`."""
    return native.quantize(_memory(w), grid, dtype=dtype_of(w)).map(mx.array)


def round_to_grid(w: mx.array, grid: Grid) -> mx.array:
    """`ops.round_to_grid(w, grid)`."""
    return mx.array(native.fake_quantize(_memory(w), grid, dtype=dtype_of(w))).view(w.dtype)


def packed_codes(codes: mx.array, element: Element) -> mx.array:
    """`packing.packed_codes(codes, element)`."""
    held = _memory(codes)
    return mx.array(native.pack(held.view(np.int8) if codes.dtype == mx.int8 else held, element))


def magnitude(x: mx.array) -> float:
    """The largest magnitude in `x`; NaN where it holds one."""
    return float(np.abs(native.extremes(_memory(x), dtype=dtype_of(x))).max())


def _memory(x: mx.array) -> NDArray[Any]:
    """`x` as NumPy, uncopied where it lies in one piece; the patterns of what is 16 bits wide."""
    held = memoryview(x)  # type: ignore[arg-type]
    if not held.c_contiguous:
        held = memoryview(mx.contiguous(x))  # type: ignore[arg-type]
    return np.frombuffer(held, PATTERN[x.itemsize]).reshape(x.shape)
