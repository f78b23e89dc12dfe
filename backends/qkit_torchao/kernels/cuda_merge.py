"""Launches of the kernel that merges a base and factors, see `triton_merge`. Imported on CUDA machines only."""

from typing import Any

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit_torchao.kernels import triton_merge, triton_words
from qkit_torchao.kernels.cuda import INTERPRETED, device_of
from qkit_torchao.kernels.geometry import geometry
from qkit_torchao.kernels.launches import Kernel
from qkit_torchao.kernels.plans import ALIGNED, TAKES, constants

TILE = 4096  #: elements of a program's tile
COLUMNS = 128  #: of it, or of the group where that is longer
LONGEST = 512  #: the longest group that a tile holds
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SPREADABLE = 24 - 8 - 9  #: bits of codes that are exact in float32 with nine more, times a scale

Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  #: see `layers.packed_product`


def takes(grid: Grid, inputs: int) -> bool:
    """Whether a program's tile holds whole groups of `grid`, whose lengths are powers of two."""
    group = grid.group
    fits = isinstance(group, int) and 1 < group <= LONGEST and group & (group - 1) == 0 and inputs % group == 0
    return fits and not grid.read and (grid.element.name, grid.scale) in TAKES


def spreads(grid: Grid, inputs: int) -> bool:
    """Whether `merged` spreads codes on `grid`: those of integers. Of codes without zero points, one bit is the sign."""
    return takes(grid, inputs) and grid.element.kind == "integer" and grid.element.bits - grid.symmetric <= SPREADABLE


def quantizes(grid: Grid, inputs: int) -> bool:
    """Whether `merged` finds values on `grid`: not where scales depend on the whole weight."""
    return takes(grid, inputs) and grid.scale != "nvfp4"


def takes_gains(grid: Grid, inputs: int) -> bool:
    """Whether `merged` multiplies scales with gains: those of integers."""
    return quantizes(grid, inputs) and grid.element.kind == "integer"


def merged(
    base: Tensor | Parts, b: Tensor, a: Tensor, scale: float, dtype: torch.dtype, *, grid: Grid | None = None,
    spread: bool = False, on_grid: bool = False, out: torch.dtype | None = None, gains: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """base [outputs, inputs] + scale * B A, of shortened factors, rounded to `dtype`; in one pass.

    Args:
        base: a weight; or packed codes on a `grid` that `takes` accepts, with their scales, zeros and tensor scale.
        b, a: [outputs, rank] and [rank, inputs].
        spread: whether the codes are spread within their cells; `spreads` must accept the grid.
        on_grid: whether the values on `grid`, which `quantizes` must accept, are returned in its place.
        out: the type of the result; `dtype` if None.
        gains: float32 [outputs, 1, 1], of the scales of these values, or of the base; `takes_gains` must accept the grid.
    """
    outputs, inputs = b.shape[0], a.shape[1]
    first, *rest = (base,) if isinstance(base, Tensor) else base
    assert isinstance(first, Tensor)
    scales, zeros, power, _ = rest or (None,) * 4  # no biases, since `takes` refuses read grids
    codes: tuple[Any, ...] | None = None
    group = 2
    if grid is not None:
        assert isinstance(grid.group, int)
        group = grid.group
    if rest:
        assert grid is not None
        names = ("INPUTS", "ELEMENT", "HIGH", "LOW", "UNIT", "UNITS", "GROUPS", "SCALES")
        codes = tuple(geometry(grid, inputs)[name] for name in names)
    result = torch.empty(outputs, inputs, dtype=out or dtype, device=first.device)
    columns = max(COLUMNS, group)
    rows = max(1, TILE // columns)
    tensors = first.contiguous(), scales, zeros, power, gains, b.contiguous(), a.contiguous(), result
    rank, target = a.shape[0], constants(grid) if grid is not None and on_grid else None
    kinds = tuple([None if one is None else (one.dtype, one.data_ptr() % ALIGNED == 0) for one in tensors])
    key = (grid, on_grid, spread, bool(rest), dtype, outputs, inputs, rank, first.device, kinds)
    with device_of(first):
        _merged(
            key, -(-outputs // rows) * -(-inputs // columns),
            (*tensors, outputs, scale, triton_words.MAGIC, inputs, rank, codes, spread, group, NAMES[dtype], target, rows,
             columns, INTERPRETED), warps=8,
        )  # fmt: skip
    return result


_merged = Kernel(triton_merge.merged)
