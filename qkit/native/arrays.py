"""The kernels on NumPy arrays: whole tensors, their rows shared out among threads where there are enough of them."""

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

from qkit import reference
from qkit.element import Element
from qkit.grid import Grid
from qkit.native.library import TYPES, function, struct
from qkit.packing import WORD_BITS, words
from qkit.qtensor import DType, QTensor, dtype_of

SHARE = 1 << 17  #: fewest numbers that are worth a thread: about as long as it takes to wake one


def quantize(w: NDArray[Any], grid: Grid, *, dtype: DType | None = None) -> QTensor[NDArray[Any]]:
    """`reference.quantize(w, grid)` of finite `w` [..., n].

    Args:
        dtype: what the patterns of `w` mean, where they come as 16-bit integers: `bfloat16` or `float16`.

    Raises:
        DTypeError, GridError: as `reference.quantize`.
        BackendError: the library was not built.
    """
    x, kind = _patterns(w, dtype)
    shape, (count, n) = grid.scale_shape(x.shape), _groups(x, grid)
    ends, tensor_scale = _of_the_tensor(x, kind, grid)
    codes = np.empty(x.shape, np.int8 if grid.element.kind == "integer" and grid.symmetric else np.uint8)
    scales = np.empty(count, np.float32 if grid.element.kind == "integer" else np.uint8)
    zeros = None if grid.symmetric else np.empty(count, np.uint8)
    call, of_grid, type_ = function("qkit_quantize"), byref(struct(grid)), TYPES.index(kind)

    def share(begin: int, end: int) -> None:
        call(
            of_grid, _address(x, begin * n), end - begin, n, type_, _end_address(ends), tensor_scale,
            _address(codes, begin * n), _address(scales, begin), None if zeros is None else _address(zeros, begin),
        )  # fmt: skip

    _run(share, count, n)
    each = prod(shape)  # one scale, where it is the tensor's: every row has found the same
    parts = {
        "scales": scales[:each].reshape(shape),
        "zeros": None if zeros is None else zeros[:each].reshape(shape),
        "tensor_scale": np.array(tensor_scale, np.float32) if grid.scale == "nvfp4" else None,
    }
    return QTensor(codes, grid=grid, dtype=kind, **parts)


def fake_quantize(
    w: NDArray[Any],
    grid: Grid,
    *,
    dtype: DType | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """`reference.fake_quantize(w, grid)` of `w` [..., n], without given scales: a group that holds a NaN comes back as NaN.

    Args:
        dtype: as for `quantize`.
        out: where to, contiguous, of the shape and type of `w`; it may be `w` itself.

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
    ends, tensor_scale = _of_the_tensor(x, kind, grid)
    call, of_grid, type_, made = function("qkit_fake_quantize"), byref(struct(grid)), TYPES.index(kind), out

    def share(begin: int, end: int) -> None:
        given = _end_address(ends), tensor_scale
        call(of_grid, _address(x, begin * n), end - begin, n, type_, *given, _address(made, begin * n))

    _run(share, count, n)
    return out


def pack(codes: NDArray[Any], element: Element) -> NDArray[np.uint32]:
    """int8 or uint8 codes [..., n] as `packing.packed_codes` packs them: little-endian words [..., words(n, bits)]."""
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
    """The highest and the lowest of `w`, zero among them; one of the two is NaN where there is a NaN.

    Args:
        dtype: as for `quantize`.

    Raises:
        DTypeError, BackendError: as `quantize`.
    """
    high, low = _extremes(*_patterns(w, dtype)).tolist()
    return high, low


def _patterns(w: NDArray[Any], dtype: DType | None) -> tuple[NDArray[Any], DType]:
    """`w`, contiguous, and what its numbers are."""
    return np.ascontiguousarray(w), dtype_of(w) if dtype is None else dtype


def _groups(x: NDArray[Any], grid: Grid) -> tuple[int, int]:
    """How many groups, and how long: where the scale is the tensor's, every row is one that has been told the extremes."""
    n = x.shape[-1] if grid.group == "tensor" else grid.group_shape(x.shape)[-1]
    return x.size // n, n


def _of_the_tensor(x: NDArray[Any], kind: DType, grid: Grid) -> tuple[Any, float]:
    """The extremes, if every group shall use the tensor's, and the tensor's scale; NaN in them where the tensor is not finite."""
    if grid.group != "tensor" and grid.scale != "nvfp4":
        return None, 0.0
    ends = _extremes(x, kind)
    if grid.group == "tensor":
        return ends, 0.0
    with np.errstate(invalid="ignore"):
        return None, float(reference.tensor_power(ends) + reference.poison(np.abs(ends).max()))


def _extremes(x: NDArray[Any], kind: DType) -> NDArray[np.float32]:
    """Highest and lowest, of which each share of the rows finds its own."""
    n, call = x.shape[-1], function("qkit_extremes")
    found = np.zeros((x.size // n, 2), np.float32)

    def share(begin: int, end: int) -> None:
        call(_address(x, begin * n), (end - begin) * n, TYPES.index(kind), _address(found, 2 * begin))

    _run(share, len(found), n)
    return np.array([found[:, 0].max(), found[:, 1].min()], np.float32)


def _address(x: NDArray[Any], offset: int) -> int:
    """Of the element that is `offset` elements from the first."""
    return int(x.__array_interface__["data"][0]) + offset * x.itemsize


def _end_address(ends: NDArray[np.float32] | None) -> int | None:
    return None if ends is None else _address(ends, 0)


# Threads

_most: list[int] = []


def use_threads(count: int) -> None:
    """At most so many for one array, in this process; without it, as many as it may use cores."""
    _most[:] = [count]


def _run(share: Callable[[int, int], None], count: int, n: int) -> None:
    """`share(begin, end)` over all of `count` things of `n` numbers each."""
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


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not live on in a child
