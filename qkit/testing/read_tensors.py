"""Every read grid, and quantized tensors on them that find mistakes: all codes, scales of many sizes, signs and types."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.element import ELEMENTS, READ_RULES
from qkit.grid import Grid, Group
from qkit.qtensor import DTYPES, DType, QTensor
from qkit.reference.rounding import DTYPE

SHAPE = (6, 128)
NANS = {"e4m3": (0x7F, 0xFF), "e5m2": (0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF)}  #: codes of no finite number
LARGEST = {"float32": 1e30, "bfloat16": 1e30, "float16": 6e4}


def read_grids() -> list[Grid]:
    """Each element with each kind of scales that are read, in groups, by row and by tensor."""
    grids = []
    for name, rule in READ_RULES.items():
        elements = [e for e in ELEMENTS.values() if e.kind in rule.kinds and (rule.only or (e.name,))[0] == e.name]
        groups: tuple[Group, ...] = (
            (rule.only[1],) if rule.only else (32, "row", "tensor") if name == "stored" else (32, 64)
        )
        grids += [Grid(e, group, name) for e in elements for group in groups]
    return grids


def read_tensors(grid: Grid) -> Iterator[QTensor[NDArray[Any]]]:
    """Tensors of `SHAPE` on `grid`, for each type of values and, where scales are floats, each type of scales."""
    for dtype in DTYPES:
        for kind in DTYPES if grid.stored_scales == "float" else DTYPES[:1]:
            yield read_tensor(grid, dtype, kind)


def read_tensor(grid: Grid, dtype: DType, kind: DType = "float32") -> QTensor[NDArray[Any]]:
    """One tensor on `grid` with values of `dtype` and scales of `kind`; the same each time."""
    draw, shape = np.random.default_rng(len(str(grid))), grid.scale_shape(SHAPE)
    return QTensor(
        _codes(grid, draw),
        _scales(grid, kind, shape, draw),
        grid,
        dtype,
        zeros=draw.integers(0, grid.element.levels + 2, shape).astype(np.uint8) if grid.has_zeros else None,
        tensor_scale=np.asarray(np.float32(0.0123)) if grid.has_tensor_scale else None,
        biases=_floats(kind, shape, draw) if grid.has_biases else None,
    )


def _codes(grid: Grid, draw: np.random.Generator) -> NDArray[Any]:
    codes = draw.integers(0, grid.element.levels + 1, SHAPE).astype(np.uint8)
    codes[0] = np.arange(SHAPE[1]) % (grid.element.levels + 1)
    codes[np.isin(codes, NANS.get(grid.element.name, ()))] = 0
    if grid.element.kind == "integer" and grid.symmetric:
        return (codes.astype(np.int16) + grid.element.lowest).astype(np.int8)
    return codes


def _scales(grid: Grid, kind: DType, shape: tuple[int, ...], draw: np.random.Generator) -> NDArray[Any]:
    if grid.stored_scales == "e8m0":
        codes = draw.integers(1, 255, shape).astype(np.uint8)
        codes.reshape(-1)[:4] = 0, 1, 254, 127
        return codes
    if grid.stored_scales == "e4m3":
        return draw.integers(0, 0x7F, shape).astype(np.uint8)
    return _floats(kind, shape, draw)


def _floats(kind: DType, shape: tuple[int, ...], draw: np.random.Generator) -> NDArray[Any]:
    """Numbers with all their bits, of either sign, among them zero, a subnormal and a large one."""
    numbers = draw.standard_normal(shape) * 2.0 ** draw.integers(-12, 3, shape)
    flat = numbers.reshape(-1)
    if flat.size > 4:
        flat[:4] = 0.0, 1e-40, LARGEST[kind], -0.37
    return numbers.astype(DTYPE[kind])
