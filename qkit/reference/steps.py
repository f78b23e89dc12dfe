"""The numbers that a grid can store, for the law of fitted codes: which scales to try, the nearest scale, and the nearest code.

Everything is fp64. A cell is a group of values, along the first axis; s and z are a scale and a zero point for each cell. Units
are values before the scale: code less zero point, or the number of a small float. A value is units * s.
"""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qkit import element as constants
from qkit.element import Element
from qkit.errors import GridError
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor
from qkit.reference.products import Doubles
from qkit.reference.rounding import FLOAT8, e4m3_values, exponent, scale_values
from qkit.reference.scale_rules import POWER_RULES, round_to_bfloat16

STEPS = 20  #: scales of integers to try
LEAST = {2: 0.45, 3: 0.6, 4: 0.7}  #: the least of them by bits, in units of the scale that clips nothing
LEAST_OF_WIDE = 0.85  #: that of more bits
MOST = 1.15
BLOCK_CODES = range(-6, 8)  #: e4m3 scales to try, counted from the rule's
FITTED = frozenset({"signed", "absmax", "midmax", "minmax", "nvfp4", *POWER_RULES})


def want_fitted(grid: Grid) -> None:
    """Refuses a grid whose scales do not follow from a rule.

    Raises:
        GridError: the message names the rule and those that can be fitted.
    """
    if grid.scale not in FITTED:
        raise GridError(
            f"cannot fit {grid}: its scales are {grid.scale!r}, not chosen by a rule; fit on one of {', '.join(sorted(FITTED))}"
        )


def steps_of(q: QTensor[NDArray[Any]]) -> tuple[Doubles, Doubles]:
    """The scales and zero points of `q`, each of the shape of its scales."""
    s = scale_values(q).astype(np.float64)
    return s, np.zeros(s.shape) if q.zeros is None else q.zeros.astype(np.float64)


def candidates(x: Doubles, s: Doubles, grid: Grid, tensor: float) -> Iterator[tuple[Doubles, Doubles]]:
    """Scales and zero points to try for cells `x` [group, cells], around the rule's `s` [cells]."""
    none: Doubles = np.zeros(s.shape)
    if grid.scale == "nvfp4":
        code = (s / tensor).astype(FLOAT8["e4m3"]).view(np.uint8).astype(np.int64)
        for offset in BLOCK_CODES:
            near = np.clip(code + offset, 1, 126).astype(np.uint8)  # 0 is no scale, 127 no number
            yield e4m3_values(near).astype(np.float64) * tensor, none
    elif grid.element.kind == "float":
        floor = np.frexp(np.abs(x).max(axis=0))[1] - 1 - grid.element.max_exponent
        for offset in (0, 1):
            yield storable(np.ldexp(1.0, floor + offset), s, grid, tensor), none
    else:
        least = LEAST.get(grid.element.bits, LEAST_OF_WIDE)
        for step in range(STEPS):
            yield from _around(x, s, grid, least + step * ((MOST - least) / (STEPS - 1)))


def _around(x: Doubles, s: Doubles, grid: Grid, f: float) -> Iterator[tuple[Doubles, Doubles]]:
    """The integer scales, with their zero points, that are `f` times the one that clips nothing."""
    if grid.scale == "minmax":
        low, high = np.minimum(x.min(axis=0), 0) * f, np.maximum(x.max(axis=0), 0) * f
        narrow = storable((high - low) / grid.element.levels, s, grid, 1.0)
        yield narrow, np.clip(np.rint(-low / narrow), 0, grid.element.levels)
        return
    scale = np.abs(x).max(axis=0) * (f / -grid.element.lowest)
    for sign in (1, -1) if grid.scale == "signed" else (1,):
        yield storable(sign * scale, s, grid, 1.0), np.zeros(s.shape)


def storable(wanted: Doubles, s: Doubles, grid: Grid, tensor: float) -> Doubles:
    """The nearest scales to `wanted` that `grid` can store; where a sign does not belong, or a number is not finite, `s`."""
    fits = np.isfinite(wanted) & ((wanted > 0) | (grid.scale == "signed"))
    wanted = np.where(fits, wanted, s)
    if grid.scale == "nvfp4":
        near = np.clip(wanted / tensor, constants.MIN_BLOCK_SCALE, 448.0).astype(FLOAT8["e4m3"])
        return near.astype(np.float64) * tensor
    if grid.element.kind == "float":
        mantissa, e = np.frexp(wanted)
        code = np.where(mantissa < 0.75, e - 1, e) + 127
        return cast(Doubles, np.ldexp(1.0, np.clip(code, constants.MIN_SCALE_CODE, constants.MAX_SCALE_CODE) - 127))
    near = round_to_bfloat16(np.clip(wanted, -constants.LIMIT, constants.LIMIT).astype(np.float32)).astype(np.float64)
    return np.where(np.abs(near) < constants.MIN_SCALE, np.where(near < 0, -1.0, 1.0) * constants.MIN_SCALE, near)


def nearest(y: Doubles, z: Doubles, grid: Grid) -> Doubles:
    """The units nearest to quotients `y` of values and scales, ties to even, clipped to the codes of the element."""
    element = grid.element
    if element.kind == "integer":
        low, high = (element.lowest, element.highest) if grid.symmetric else (-z, element.levels - z)
        return cast(Doubles, np.clip(np.rint(y), low, high))
    floor = (np.abs(y).view(np.int64) >> 52) - 1023  # of log2, from the bits
    power = np.maximum(floor, element.min_exponent) - element.mantissa
    step = ((power + 1023) << 52).view(np.float64)
    return cast(Doubles, np.clip(np.rint(y / step) * step, -element.largest, element.largest))


def stored(
    units: Doubles, s: Doubles, z: Doubles, grid: Grid, tensor: NDArray[Any] | None, dtype: DType
) -> QTensor[NDArray[Any]]:
    """The `QTensor` of `units` [..., n] on scales `s` and zero points `z` [..., groups]."""
    if grid.scale == "nvfp4":
        assert tensor is not None
        block = (s / float(tensor)).astype(FLOAT8["e4m3"]).view(np.uint8)
        return QTensor(_float_bits(units, grid.element), block, grid, dtype, tensor_scale=tensor)
    if grid.element.kind == "float":
        return QTensor(_float_bits(units, grid.element), exponent(s.astype(np.float32)), grid, dtype)
    if grid.symmetric:
        return QTensor(units.astype(np.int8), s.astype(np.float32), grid, dtype)
    codes = units.reshape(grid.group_shape(units.shape)) + z[..., None]
    zeros = z.astype(np.uint8)
    return QTensor(codes.astype(np.uint8).reshape(units.shape), s.astype(np.float32), grid, dtype, zeros=zeros)


def _float_bits(units: Doubles, element: Element) -> NDArray[np.uint8]:
    if element.name != "e2m1":
        return units.astype(FLOAT8[element.name]).view(np.uint8)
    magnitudes = np.array(constants.E2M1_VALUES[:8])
    sign = np.signbit(units).astype(np.uint8) << np.uint8(3)
    return cast(NDArray[np.uint8], np.searchsorted(magnitudes, np.abs(units)).astype(np.uint8) | sign)
