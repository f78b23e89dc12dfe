"""Loads `kernels.compiled` through ctypes, which releases Python's lock while a kernel runs, and declares its elements and rules.

The elements and scale rules are written out here, as kernels.c has them: a new one is not the kernels' before it is in both.
"""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint8, c_void_p
from functools import lru_cache
from typing import Any

from qkit import element as constants
from qkit.element import ELEMENTS, STEP, Element
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.native.build import LIBRARY, digest

TYPES = ("float32", "bfloat16", "float16")  #: in the order of the enum in kernels.c
TAKES = frozenset({"int2", "int3", "int4", "int5", "int6", "int8", "e2m1", "e4m3", "e5m2"})  #: elements of kernels.c
#: Scale rules of kernels.c, and the number of each in its enum. `absmax` and `midmax` differ in their multiplier only.
RULES = {"signed": 0, "absmax": 1, "midmax": 1, "minmax": 2, "rceil": 3, "even": 4, "floor": 5, "nvfp4": 6}
DONE = 0  #: returned by a kernel that wrote its output; any other number says that it wrote nothing


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
    "qkit_multiply": (c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_void_p, c_void_p),
    "qkit_decode": (c_void_p, c_int32, c_void_p, c_void_p),
    "qkit_halves": (c_void_p, c_int64, c_int64, c_void_p),
    "qkit_blocks": (c_void_p, c_void_p, c_int64, c_int64, c_int32, c_void_p),
    "qkit_spans": (c_void_p, c_int64, c_void_p, c_void_p),
    "qkit_repeated": (c_void_p, c_int64, c_int64, c_float, c_int32, c_void_p),
    "qkit_interleave": (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int32, c_uint8, c_void_p),
}


def available() -> bool:
    """Whether the library was built, from the source that is here."""
    return _library() is not None


def takes(grid: Grid) -> bool:
    """Whether kernels.c computes `grid`."""
    return grid.element.name in TAKES and grid.scale in RULES


def packs(element: Element) -> bool:
    """Whether kernels.c packs codes of `element`."""
    return element.name in TAKES


def function(name: str) -> Callable[..., None]:
    """One of `SIGNATURES`. It raises a BackendError where the kernel wrote nothing.

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
    """The constants of `grid`, for the kernels.

    Raises:
        BackendError: the kernels do not compute it.
    """
    e = grid.element
    if not takes(grid):
        raise BackendError(f"the compiled kernels do not compute {grid}: use qkit.reference")
    lowest, highest = (float(e.lowest), float(e.highest)) if grid.symmetric else (0.0, float(e.levels))
    if e.kind == "float":
        lowest, highest = -e.largest, e.largest
    return Struct(
        RULES[grid.scale], e.bits, e.mantissa, e.min_exponent, e.max_exponent,
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
        found.argtypes, found.restype, found.errcheck = arguments, c_int32, _check
    return library


def _check(code: int, kernel: Any, arguments: tuple[Any, ...]) -> None:
    """Called by ctypes with the number that a kernel returned."""
    if code != DONE:
        raise BackendError(f"{kernel.__name__} of {LIBRARY.name} does not know its arguments: use qkit.reference")
