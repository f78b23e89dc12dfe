"""Codes of another program as plain arrays, and the law of their values: one page, whatever the layout of the file.

value = fl(fl(code - zero) * s) + offset, in float32, where s is the stored scale, widened. A tensor scale comes into s first,
with one rounding: s = fl(scale * tensor_scale), or fl(scale / divisor) where the file stores the divisor.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.element import E2M1_VALUES
from qkit.errors import ArtifactError

E2M1: Final = np.array(E2M1_VALUES, np.float32)
NAN: Final = 255  #: the E8M0 code that is no number


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """Some rows of a weight, not decoded.

    Attributes:
        element: name of the element: `int4`, `e2m1`, `e4m3`, ...
        codes: [rows, n]. Integers as int8 or uint8; floats as the uint8 bits of one element each.
        scales: [scale rows, groups], of the type in the file. uint8 is an E8M0 code c, which means 2^(c-127).
        block: rows and columns that share a scale; rows count from the first row here.
        zeros: integer zero points, shaped like `scales`; None where the number 0 has code 0.
        offsets: float offsets, shaped like `scales`: the value of code 0.
        tensor_scale: float32, multiplies every scale.
        divisor: float32, divides every scale.
        groups: by column, the number of its group; None where groups are contiguous.
    """

    element: str
    codes: NDArray[Any]
    scales: NDArray[Any]
    block: tuple[int, int]
    zeros: NDArray[Any] | None = None
    offsets: NDArray[Any] | None = None
    tensor_scale: np.float32 | None = None
    divisor: np.float32 | None = None
    groups: NDArray[Any] | None = None


def values(codes: Codes) -> NDArray[np.float32]:
    """The values of `codes`, float32 [rows, n].

    Raises:
        ArtifactError: a scale is E8M0's code for no number.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are refused where values are used
        found = numbers(codes)
        if codes.zeros is not None:
            found = found - _spread(codes.zeros.astype(np.float32), codes)
        found = found * _spread(scales_of(codes), codes)
        if codes.offsets is not None:
            found = found + _spread(codes.offsets.astype(np.float32), codes)
    return found


def numbers(codes: Codes) -> NDArray[np.float32]:
    """The numbers that the codes stand for, before any scale."""
    import ml_dtypes  # here, so that `import qkit` stays cheap

    if codes.element.startswith("int"):
        return np.asarray(codes.codes, np.float32)
    if codes.element == "e2m1":
        return np.asarray(E2M1[codes.codes])
    kind = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[codes.element]
    found: NDArray[np.float32] = codes.codes.view(kind).astype(np.float32)
    return found


def scales_of(codes: Codes) -> NDArray[np.float32]:
    """The factors of the groups as float32, tensor scale included."""
    scales = widened(codes.scales)
    if codes.tensor_scale is not None:
        return scales * codes.tensor_scale
    return scales if codes.divisor is None else scales / codes.divisor


def widened(scales: NDArray[Any]) -> NDArray[np.float32]:
    """Stored scales as float32, which is exact. Raises as `values`."""
    if scales.dtype.name == "float8_e8m0fnu":
        scales = scales.view(np.uint8)
    if scales.dtype != np.uint8:
        return scales.astype(np.float32)
    if (scales == NAN).any():
        raise ArtifactError(f"{int((scales == NAN).sum())} scales are E8M0's code {NAN}, which is no number")
    return np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype(np.float32)


def _spread(per_group: NDArray[np.float32], codes: Codes) -> NDArray[np.float32]:
    """One number per group as an array that broadcasts against the codes."""
    rows, n = codes.codes.shape
    down, along = codes.block
    if codes.groups is not None:
        wide = per_group[:, codes.groups]
    elif per_group.shape[1] == 1:
        wide = per_group
    else:
        wide = np.repeat(per_group, along, axis=1)[:, :n]
    return wide if down == 1 or wide.shape[0] == 1 else np.repeat(wide, down, axis=0)[:rows]
