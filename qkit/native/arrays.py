"""The kernels on whole NumPy arrays. Threads share the rows of large ones."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.element import Element
from qkit.grid import Grid
from qkit.native.library import TYPES, function, packs, struct, takes
from qkit.qtensor import DType, QTensor, dtype_of
from qkit.reference import packing, rounding
from qkit.reference.packing import WORD_BITS, Packed, packed_codes, words
from qkit.reference.scale_rules import poison

SHARE = 1 << 17  #: fewest numbers that are worth a thread: waking one takes about as long as they do


def quantize(
    w: NDArray[Any], grid: Grid, *, dtype: DType | None = None, peak: float | None = None
) -> QTensor[NDArray[Any]]:
    """`reference.quantize(w, grid, peak=peak)` of finite `w` [..., n].

    Args:
        dtype: `bfloat16` or `float16`, the type of the numbers of `w` if `w` is an array of 16-bit integers.
        peak: see `reference.quantize`.

    Raises:
        DTypeError, GridError: as `reference.quantize`.
        BackendError: the library was not built.
    """
    if not takes(grid):
        return rounding.quantize(_floats(w, dtype), grid, peak=peak)
    x, kind = _patterns(w, dtype)
    count, n = _groups(x, grid)
    of = _Of(x, kind, grid, peak)
    codes = np.empty(x.shape, np.int8 if grid.element.kind == "integer" and grid.symmetric else np.uint8)

    def share(begin: int, end: int) -> None:
        of.quantize(begin, codes=_address(codes, begin * n), rows=1, groups=end - begin, words=None, width=0)

    _run(share, count, n)
    return QTensor(codes, grid=grid, dtype=kind, **of.parts())


def quantize_packed(w: NDArray[Any], grid: Grid, *, dtype: DType | None = None) -> Packed:
    """`pack(quantize(w, grid))` of finite `w` [rows, n], a row at a time, so that only packed codes go through memory.

    Arguments and errors: see `quantize`.
    """
    if not takes(grid):
        q = rounding.quantize(_floats(w, dtype), grid)
        return Packed(packed_codes(q), q.scales, grid, q.dtype, q.shape, q.zeros, q.tensor_scale)
    x, kind = _patterns(w, dtype)
    rows, n = x.shape
    groups = _groups(x, grid)[0] // rows
    of = _Of(x, kind, grid)
    packed = np.empty((rows, words(n, grid.element.bits)), "<u4")
    width = packed.shape[1] * WORD_BITS // 8

    def share(begin: int, end: int) -> None:
        row, to = np.empty(n, np.uint8), _address(packed, begin * width // 4)
        of.quantize(begin * groups, codes=_address(row, 0), rows=end - begin, groups=groups, words=to, width=width)

    _run(share, rows, n)
    return Packed(packed, grid=grid, dtype=kind, shape=x.shape, **of.parts())


def fake_quantize(
    w: NDArray[Any],
    grid: Grid,
    *,
    dtype: DType | None = None,
    out: NDArray[Any] | None = None,
    peak: float | None = None,
) -> NDArray[Any]:
    """`reference.fake_quantize(w, grid, peak=peak)` of `w` [..., n] on the scales of its rule: a group with a NaN becomes NaN.

    Args:
        dtype, peak: as for `quantize`.
        out: a contiguous array of the shape and type of `w` for the values; it may be `w` itself, which is slower.

    Raises:
        ValueError: `out` does not fit.
        DTypeError, GridError, BackendError: as `quantize`.
    """
    x, kind = _patterns(w, dtype)
    count, n = _groups(x, grid)
    if out is None:
        out = np.empty(x.shape, x.dtype)
    elif out.shape != x.shape or out.dtype != x.dtype or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} {out.shape}: it has to be contiguous {x.dtype} {x.shape}")
    if not takes(grid):
        out[...] = rounding.fake_quantize(_floats(w, dtype), grid, peak=peak).view(out.dtype)
        return out
    ends, tensor_scale = _of_the_tensor(x, kind, grid, peak)
    call, of_grid, type_, made = function("qkit_fake_quantize"), byref(struct(grid)), TYPES.index(kind), out

    def share(begin: int, end: int) -> None:
        given = _end_address(ends), tensor_scale
        call(of_grid, _address(x, begin * n), end - begin, n, type_, *given, _address(made, begin * n))

    _run(share, count, n)
    return out


def pack(codes: NDArray[Any], element: Element) -> NDArray[np.uint32]:
    """int8 or uint8 codes [..., n] as `packing.packed_codes` packs them: little-endian words [..., words(n, bits)].

    Raises:
        BackendError: the library was not built.
    """
    if not packs(element):
        return packing.pack(packing.unsigned(codes, element), element.bits)
    codes = np.ascontiguousarray(codes)
    n, bits = codes.shape[-1], element.bits
    out = np.empty((*codes.shape[:-1], words(n, bits)), "<u4")
    flip = -element.lowest if codes.dtype == np.int8 else 0
    call, width = function("qkit_pack"), out.shape[-1] * WORD_BITS // 8

    def share(begin: int, end: int) -> None:
        call(_address(codes, begin * n), end - begin, n, bits, flip, _address(out, begin * width // 4), width)

    _run(share, codes.size // n, n)
    return out


def extremes(w: NDArray[Any], *, dtype: DType | None = None) -> tuple[float, float]:
    """The highest and the lowest of `w`; zero counts as a number. One of the two is NaN if `w` has a NaN.

    Args:
        dtype: as for `quantize`.

    Raises:
        DTypeError, BackendError: as `quantize`.
    """
    high, low = _extremes(*_patterns(w, dtype)).tolist()
    return high, low


def _patterns(w: NDArray[Any], dtype: DType | None) -> tuple[NDArray[Any], DType]:
    """`w`, contiguous and aligned, and the type of its numbers."""
    return np.require(w, requirements=("C", "A")), dtype_of(w) if dtype is None else dtype


def _floats(w: NDArray[Any], dtype: DType | None) -> NDArray[Any]:
    """`w` in the type of its numbers, for the law."""
    return w if dtype is None else w.view(rounding.DTYPE[dtype])


def _groups(x: NDArray[Any], grid: Grid) -> tuple[int, int]:
    """How many groups, and their length. With one scale for the tensor, each row is a group on the tensor's extremes."""
    group = grid.group_shape(x.shape)[-1]
    n = x.shape[-1] if grid.group == "tensor" else group
    return x.size // n, n


def _of_the_tensor(x: NDArray[Any], kind: DType, grid: Grid, peak: float | None) -> tuple[Any, float]:
    """The tensor's extremes, if every group uses them, and the tensor's scale. NaN if the tensor is not finite."""
    if grid.group != "tensor" and grid.scale != "nvfp4":
        return None, 0.0
    ends = _extremes(x, kind) if peak is None else np.array(peak, np.float32)
    if grid.group == "tensor":
        return ends, 0.0
    with np.errstate(invalid="ignore"):
        return None, float(rounding.tensor_power(ends) + poison(np.abs(ends).max()))


def _extremes(x: NDArray[Any], kind: DType) -> NDArray[np.float32]:
    """The highest and the lowest number; each share of the rows finds its own first."""
    n, call = x.shape[-1], function("qkit_extremes")
    found = np.zeros((x.size // n, 2), np.float32)

    def share(begin: int, end: int) -> None:
        call(_address(x, begin * n), (end - begin) * n, TYPES.index(kind), _address(found, 2 * begin))

    _run(share, len(found), n)
    return np.array([found[:, 0].max(), found[:, 1].min()], np.float32)


def _address(x: NDArray[Any], offset: int) -> int:
    """The address of the element that is `offset` elements after the first."""
    return int(x.__array_interface__["data"][0]) + offset * x.itemsize


class _Of:
    """The scales of `x`, and the call of the kernel that computes them with the codes."""

    def __init__(self, x: NDArray[Any], kind: DType, grid: Grid, peak: float | None = None) -> None:
        self._x, self._type, self._grid = x, TYPES.index(kind), grid
        count, self._n = _groups(x, grid)
        self._ends, self._tensor_scale = _of_the_tensor(x, kind, grid, peak)
        self._scales = np.empty(count, np.float32 if grid.element.kind == "integer" else np.uint8)
        self._zeros = None if grid.symmetric else np.empty(count, np.uint8)
        self._call, self._struct = function("qkit_quantize"), byref(struct(grid))

    def quantize(self, first: int, *, codes: int, rows: int, groups: int, words: int | None, width: int) -> None:
        """Quantizes groups from the `first` on; see kernels.c for the arguments."""
        zeros = None if self._zeros is None else _address(self._zeros, first)
        self._call(
            self._struct, _address(self._x, first * self._n), rows, groups, self._n, self._type, _end_address(self._ends),
            self._tensor_scale, codes, _address(self._scales, first), zeros, words, width,
        )  # fmt: skip

    def parts(self) -> dict[str, Any]:
        """The fields of the `QTensor` beside its codes. With one scale for the tensor, every row has found the same one."""
        shape, of_tensor = self._grid.scale_shape(self._x.shape), self._grid.scale == "nvfp4"
        return {
            "scales": self._scales[: prod(shape)].reshape(shape),
            "zeros": None if self._zeros is None else self._zeros[: prod(shape)].reshape(shape),
            "tensor_scale": np.array(self._tensor_scale, np.float32) if of_tensor else None,
        }


def _end_address(ends: NDArray[np.float32] | None) -> int | None:
    return None if ends is None else _address(ends, 0)


# Threads

_most: list[int] = []


def use_threads(count: int) -> None:
    """Limits the threads of one array to `count` in this process. The default is the number of usable cores."""
    _most[:] = [count]


def _run(share: Callable[[int, int], None], count: int, n: int) -> None:
    """Calls `share(begin, end)` for parts of `count` rows or groups of `n` numbers each."""
    parts = min(count * n // SHARE, count)
    if parts < 2 or (parts := min(parts, _most[0] if _most else _cores())) < 2:
        share(0, count)
        return
    edges = [count * i // parts for i in range(parts + 1)]
    rest = [_pool().submit(share, begin, end) for begin, end in pairwise(edges[1:])]
    share(0, edges[1])
    for done in rest:
        done.result()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(_cores() - 1, 1), thread_name_prefix="qkit")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has no threads of its parent
