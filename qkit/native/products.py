"""Products with packed codes, and their values: products.c and values.c, on memory that callers name by its address.

OpenMP's threads are used where the process has loaded its runtime, as torch does on Linux; elsewhere, the caller's thread alone.
"""

import ctypes
from ctypes import byref, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache

from qkit.native.library import TYPES, function

#: Types of scales, in the order of the enum in weights.h.
SCALES = ("float32", "bfloat16", "float16", "e8m0", "any e8m0", "e4m3", "e4m3 times", "e4m3 over")
SHARE = 1 << 16  #: fewest codes that are worth a thread


INTEGERS = ("integer", "high", "low", "unit", "scale_type", "bias_type")


class Weight(ctypes.Structure):
    """`struct weight` of weights.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("codes", "scales", "zeros", "biases")),
        *((name, c_int64) for name in ("outputs", "inputs", "group", "groups")),
        *((name, c_int32) for name in (*INTEGERS, "mantissa", "min_exponent")),
        ("power", c_float),
    )


class Team(ctypes.Structure):
    """`struct team` of weights.h."""

    _fields_ = (("run", c_void_p), ("rank", c_void_p), ("size", c_void_p), ("threads", c_int32))


def multiply(weight: Weight, x: int, *, rows: int, dtype: str, bias: int | None, out: int, threads: int) -> None:
    """x [rows, inputs] times the weight [outputs, inputs], and `bias` [outputs] -> out [rows, outputs], all of `dtype`.

    Args:
        x, bias, out: addresses of contiguous arrays.
    """
    team = _team(_threads(weight, threads))
    function("qkit_multiply")(byref(weight), x, rows, TYPES.index(dtype), bias, out, team)


def decode(weight: Weight, out: int, *, dtype: str, threads: int) -> None:
    """The values [outputs, inputs] of the weight, rounded once to `dtype`, into the memory at `out`."""
    function("qkit_decode")(byref(weight), TYPES.index(dtype), out, _team(_threads(weight, threads)))


def _threads(weight: Weight, most: int) -> int:
    codes: int = weight.outputs * weight.inputs
    return max(1, min(most, codes // SHARE))


@lru_cache
def _team(threads: int) -> ctypes.Array[Team]:
    process = ctypes.CDLL(None)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    try:
        found = [ctypes.cast(getattr(process, name), c_void_p).value for name in names]
    except AttributeError:
        found, threads = [None] * len(names), 1
    return (Team * 1)(Team(*found, threads))
