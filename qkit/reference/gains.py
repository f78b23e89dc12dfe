"""The law of gains: the scales of a row of codes, multiplied by a number that trains beside the factors of an adapter, in NumPy.

The codes are those of the merged weight on the scales that are there, or that the rule of the grid chooses. The values then have
the scales times the gain of their row, rounded to the type of files. So a merge stores the very scales that were trained with.
Scales train while weights are codes: as in PEQA (Kim et al., 2023, https://arxiv.org/abs/2305.14152), there one for each group.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.element import MIN_SCALE
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor, dtype_of
from qkit.reference import rounding
from qkit.reference.scale_rules import Floats, round_to_bfloat16

UNIT = 2.0  #: a scale is multiplied by 1 + UNIT * gain; a power of two, so that this product is exact
LIMITS = 0.5, 2.0  #: of that factor, so that no scale changes its sign or becomes zero
SMALLEST = 2.0**-125  #: scales below it stay as they are: some devices have no subnormal numbers
#: The largest number of each type of scales.
LARGEST: dict[DType, float] = {
    "float32": (2 - 2.0**-23) * 2.0**127,
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
    "float16": 65504.0,
}


def takes_gains(grid: Grid) -> bool:
    """Whether each row on `grid` has scales of its own, and these are floats: no powers of two, and no e4m3."""
    return grid.stored_scales == "float" and grid.group != "tensor"


def gained(q: QTensor[NDArray[Any]], gains: Floats) -> QTensor[NDArray[Any]]:
    """`q` [rows, n] with the scales of each row multiplied by 1 + UNIT * its gain, float32 [rows]; rounded to their type.

    On grids of qkit's own, scales stay on the bfloat16 grid, and at least 2^-96 in magnitude.
    """
    before = q.scales.astype(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        factors = np.clip(np.float32(1) + np.float32(UNIT) * gains, np.float32(LIMITS[0]), np.float32(LIMITS[1]))
        largest = np.float32(LARGEST[stored_type(q)])
        s = np.clip(before * factors[:, None], -largest, largest)
        if q.grid.read:
            return replace(q, scales=np.where(np.abs(before) < SMALLEST, q.scales, s.astype(q.scales.dtype)))
        least = np.where(s < 0, np.float32(-MIN_SCALE), np.float32(MIN_SCALE))
        return replace(q, scales=np.where(np.abs(s) < MIN_SCALE, least, round_to_bfloat16(s)))


def stored_type(q: QTensor[Any]) -> DType:
    """The type that the scales of `q` are rounded to."""
    return dtype_of(q.scales) if q.grid.read else "bfloat16"


def slopes(q: QTensor[NDArray[Any]]) -> Floats:
    """The values [rows, n] of `q` without its biases, in float32: how they grow with the factors of their scales."""
    biases = None if q.biases is None else np.zeros_like(q.biases)
    found: Floats = rounding.dequantize(replace(q, biases=biases, dtype="float32"))
    return found


def to_gains(gradient: NDArray[Any], q: QTensor[NDArray[Any]]) -> Floats:
    """The gradient of the gains, from that of the values [rows, n] with the codes of `q`, whose scales are without gains.

    It passes straight through the rounding of scales and through their limits.
    """
    found: Floats = (gradient.astype(np.float32) * slopes(q)).sum(axis=-1) * np.float32(UNIT)
    return found
