"""A faster `reference.quantize` for big blocks, bit for bit, in NumPy.

It differs from the reference in two ways. It finds the extremes of groups on integers, since the patterns of floats of one sign
are in the order of their values, and across groups, since NumPy is slow along short axes. It computes codes in place. The
reference's own functions compute scales from the extremes: for the rules of `RULES`, which look at nothing else.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit.reference import rounding
from qkit.reference.scale_rules import Floats, amax

RULES = frozenset({"signed", "absmax", "midmax", "minmax", "rceil", "even", "floor", "nvfp4"})
LONG = 512  #: the shortest group along which NumPy reduces fast
UNIT = 16  #: bytes that are moved at once: a complex128


def keep_memory() -> None:
    """Makes glibc reuse the memory of freed blocks instead of returning it page by page. Call it once in a process.

    This saves a third of the time, measured. glibc's threshold follows the largest block that was ever freed (mallopt(3),
    M_MMAP_THRESHOLD). With another C library the call does nothing.
    """
    np.empty(1 << 24, np.uint8)


def quantize(w: NDArray[Any], grid: Grid) -> QTensor[NDArray[Any]]:
    """`reference.quantize(w, grid)` for finite `w` [rows, n]."""
    if grid.scale not in RULES:
        return rounding.quantize(w, grid)
    e, x = extremes(w, grid), rounding.group(w, grid)
    if grid.element.kind == "float":
        return _quantize_to_floats(w, x, e, grid)
    if grid.symmetric:
        s, z = rounding.symmetric_scale(e, grid), None
        low, high = grid.element.lowest, grid.element.highest
    else:
        s, z = rounding.asymmetric_scale(e, grid.element)
        low, high = 0, grid.element.levels
    np.divide(x, s[..., None], out=x)
    np.rint(x, out=x)
    if z is not None:
        np.add(x, z[..., None], out=x)
    codes = x.astype(np.int8 if grid.symmetric and grid.element.bits < 8 else np.int16)
    np.clip(codes, low, high, out=codes)
    narrow = codes.astype(np.int8 if z is None else np.uint8, copy=False).reshape(w.shape)
    return QTensor(narrow, s, grid, dtype_of(w), zeros=None if z is None else z.astype(np.uint8))


def _quantize_to_floats(w: NDArray[Any], x: Floats, e: Floats, grid: Grid) -> QTensor[NDArray[Any]]:
    """Codes on small floats by the reference's own functions, with the extremes in place of whole groups."""
    if grid.scale == "nvfp4":
        tensor_scale = rounding.tensor_power(e)
        s = rounding.block_scale(e, tensor_scale)
        codes = rounding.e2m1_codes(x, rounding.e4m3_values(s) * tensor_scale)
        return QTensor(codes.reshape(w.shape), s, grid, dtype_of(w), tensor_scale=tensor_scale)
    c = rounding.scale_code(amax(e), grid)
    return QTensor(rounding.float_codes(x, c, grid.element).reshape(w.shape), c, grid, dtype_of(w))


def extremes(w: NDArray[Any], grid: Grid) -> Floats:
    """[rows, n] -> the highest and the lowest value of each group, zero among them, float32 [..., groups, 2].

    Highest and lowest values lie in separate blocks of memory, so that later operations run along the groups.
    """
    shape = grid.scale_shape(w.shape)
    signed, unsigned = (np.int16, np.uint16) if w.itemsize == 2 else (np.int32, np.uint32)
    patterns = w.view(unsigned).reshape(shape[0] * shape[1], -1)
    out = np.empty((2, *shape), unsigned)
    high, low = out.reshape(2, -1)
    if patterns.shape[1] < LONG and patterns.shape[1] * w.itemsize % UNIT == 0:
        units = np.ascontiguousarray(patterns.view(np.complex128).T)
        lanes = units.view(unsigned).reshape(*units.shape, -1)  # [size / lanes, groups, lanes]
        for pattern, largest in ((signed, high), (unsigned, low)):
            most = np.ascontiguousarray(lanes.view(pattern).max(axis=0).T)
            most.max(axis=0, out=largest.view(pattern))
    else:
        patterns.view(signed).max(axis=1, out=high.view(signed))
        patterns.max(axis=1, out=low)
    np.maximum(high.view(signed), 0, out=high.view(signed))  # negative floats are negative integers
    np.maximum(low, 1 << 8 * w.itemsize - 1, out=low)  # and large unsigned ones; -0.0 is the smallest
    return out.view(w.dtype).astype(np.float32).transpose(1, 2, 0)
