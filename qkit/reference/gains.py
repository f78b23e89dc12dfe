"""The law of gains: scales and biases of codes, moved by numbers that train beside the factors of an adapter, in NumPy.

The codes are those of the merged weight on the scales that are there, or that the rule of the grid chooses. The values then have
scales times their gains, and moved biases, rounded to the type of files. So a merge stores the numbers that were trained with.
Scales of groups train as in PEQA (Kim et al., 2023, https://arxiv.org/abs/2305.14152), and biases of groups as the zero points of
QA-LoRA (Xu et al., 2023, https://arxiv.org/abs/2309.14717).
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.element import MIN_SCALE
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor, dtype_of
from qkit.reference import rounding
from qkit.reference.merged import shorten
from qkit.reference.scale_rules import Floats, round_to_bfloat16

UNIT = 2.0  #: a scale is multiplied by 1 + UNIT * gain; a power of two, so that this product is exact
SHIFT = 32.0  #: a bias moves by SHIFT * its number of scales; a power of two, too
LIMITS = 0.5, 2.0  #: of that factor, so that no scale changes its sign or becomes zero
NARROW = 0.9, 1.1  #: the same of read grids, whose groups have gains of their own: more harms at high rates
FARTHEST = 0.5  #: scales that a bias moves by, at most
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


def gains_shape(grid: Grid, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The shape of the gains of a weight [outputs, inputs] on `grid`.

    On read grids each group has one for its scale, and a second for its bias, if it has one. On qkit's own each row has one.
    """
    outputs, *_ = shape
    return (outputs, grid.scale_shape(shape)[-1], 1 + grid.has_biases) if grid.read else (outputs, 1, 1)


def gained(q: QTensor[NDArray[Any]], gains: Floats) -> QTensor[NDArray[Any]]:
    """`q` [rows, n] with scales multiplied by 1 + UNIT * their gain, and biases moved, both rounded to their type.

    On grids of qkit's own, scales stay on the bfloat16 grid, and at least 2^-96 in magnitude.

    Args:
        gains: float32 [rows, groups or 1, numbers], see `gains_shape`.
    """
    before = q.scales.astype(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        factors, (low, high) = np.float32(1) + np.float32(UNIT) * gains[..., 0], NARROW if q.grid.read else LIMITS
        largest = np.float32(LARGEST[stored_type(q)])
        s = np.clip(before * np.clip(factors, np.float32(low), np.float32(high)), -largest, largest)
        if q.grid.read:
            scales = np.where(np.abs(before) < SMALLEST, q.scales, s.astype(q.scales.dtype))
            return replace(q, scales=scales, biases=_moved(q, gains))
        least = np.where(s < 0, np.float32(-MIN_SCALE), np.float32(MIN_SCALE))
        return replace(q, scales=np.where(np.abs(s) < MIN_SCALE, least, round_to_bfloat16(s)))


def _moved(q: QTensor[NDArray[Any]], gains: Floats) -> NDArray[Any] | None:
    """The biases of `q`, moved by SHIFT * their gain of scales. Both factors are shortened, so that their product is exact."""
    if q.biases is None or gains.shape[-1] == 1:
        return q.biases
    largest = np.float32(LARGEST[stored_type(q)])
    shift = np.clip(np.float32(SHIFT) * gains[..., 1], np.float32(-FARTHEST), np.float32(FARTHEST))
    by = shorten(q.scales.astype(np.float32)) * shorten(shift)
    b = np.clip(_flushed(q.biases.astype(np.float32)) + by, -largest, largest)
    return np.where(np.abs(by) < SMALLEST, q.biases, _flushed(b).astype(q.biases.dtype))


def _flushed(x: Floats) -> Floats:
    return np.where(np.abs(x) < SMALLEST, np.float32(0), x)


def stored_type(q: QTensor[Any]) -> DType:
    """The type that the scales of `q` are rounded to."""
    return dtype_of(q.scales) if q.grid.read else "bfloat16"


def slopes(q: QTensor[NDArray[Any]]) -> Floats:
    """The values [rows, n] of `q` without its biases, in float32: how they grow with the factors of their scales."""
    biases = None if q.biases is None else np.zeros_like(q.biases)
    found: Floats = rounding.dequantize(replace(q, biases=biases, dtype="float32"))
    return found


def to_gains(gradient: NDArray[Any], q: QTensor[NDArray[Any]], shape: tuple[int, int, int]) -> Floats:
    """The gradient of gains of `shape`, from that of the values [rows, n] with the codes of `q`, whose scales are without gains.

    It passes straight through the rounding of scales and biases, and through their limits.
    """
    rows, groups, numbers = shape
    to_values = gradient.astype(np.float32)
    to_scales = (to_values * slopes(q)).reshape(rows, groups, -1).sum(axis=-1) * np.float32(UNIT)
    if numbers == 1:
        return np.asarray(to_scales[..., None], np.float32)
    to_biases = to_values.reshape(rows, groups, -1).sum(axis=-1) * q.scales.astype(np.float32) * np.float32(SHIFT)
    return np.stack([to_scales, to_biases], axis=-1)
