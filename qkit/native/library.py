"""`kernels.compiled` by way of ctypes, which lets go of Python's lock while a kernel runs, and the grids as its struct."""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint8, c_void_p
from functools import lru_cache
from typing import Any

from qkit import element as constants
from qkit.element import ELEMENTS, STEP
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.native.build import LIBRARY, digest

TYPES = ("float32", "bfloat16", "float16")  #: in the order of the enum in kernels.c
RULES = ("signed", "symmetric", "minmax", "rceil", "even", "floor", "nvfp4")


class Struct(ctypes.Structure):
    """`struct grid` of kernels.c."""

    _fields_ = (
        *(
            (name, c_int32)
            for name in ("rule", "bits", "mantissa", "min_exponent", "max_exponent", "min_code", "max_code")
        ),
        *((name, c_float) for name in ("lowest", "highest", "step", "min_scale", "min_block", "max_block")),
    )


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "qkit_extremes": (c_void_p, c_int64, c_int32, c_void_p),
    "qkit_quantize": (
        *(POINTER(Struct), c_void_p, c_int64, c_int64, c_int64, c_int32, c_void_p, c_float),
        *(c_void_p, c_void_p, c_void_p, c_void_p, c_int64),
    ),
    "qkit_fake_quantize": (POINTER(Struct), c_void_p, c_int64, c_int64, c_int32, c_void_p, c_float, c_void_p),
    "qkit_pack": (c_void_p, c_int64, c_int64, c_int32, c_uint8, c_void_p, c_int64),
}


def available() -> bool:
    """Whether the library was built, from the source that is here."""
    return _library() is not None


def function(name: str) -> Callable[..., None]:
    """One of `SIGNATURES`.

    Raises:
        BackendError: the library is not there.
    """
    library = _library()
    if library is None:
        raise BackendError(f"{LIBRARY} was not built from its source: run python {LIBRARY.with_name('build.py')}")
    found: Callable[..., None] = getattr(library, name)
    return found


@lru_cache(maxsize=256)
def struct(grid: Grid) -> Struct:
    """What the kernels need to know of `grid`."""
    e = grid.element
    rule = "symmetric" if grid.scale in ("absmax", "midmax") else grid.scale
    lowest, highest = (float(e.lowest), float(e.highest)) if grid.symmetric else (0.0, float(e.levels))
    if e.kind == "float":
        lowest, highest = -e.largest, e.largest
    return Struct(
        RULES.index(rule), e.bits, e.mantissa, e.min_exponent, e.max_exponent,
        constants.MIN_SCALE_CODE, constants.MAX_SCALE_CODE,
        lowest, highest, STEP.get((e.name, grid.scale), 0.0), constants.MIN_SCALE,
        constants.MIN_BLOCK_SCALE, ELEMENTS["e4m3"].largest,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
        says = ctypes.c_char_p.in_dll(library, "qkit_digest").value
    except (OSError, ValueError):
        return None
    if says != digest().encode():
        return None
    for name, arguments in SIGNATURES.items():
        found = getattr(library, name)
        found.argtypes, found.restype = arguments, None
    return library
