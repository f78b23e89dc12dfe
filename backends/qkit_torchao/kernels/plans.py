"""How tensors are cut into tiles for the Triton kernels: all that follows from a shape, a type and a grid. Launches nothing."""

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from qkit import element as elements
from qkit.element import STEP
from qkit.grid import Grid

#: Pairs of element and scale rule that the kernels compute: integers of up to a byte, and three small floats.
TAKES = frozenset(
    {
        *product((f"int{bits}" for bits in range(2, 9)), ("signed", "absmax", "midmax", "minmax")),
        *product(("e2m1", "e4m3", "e5m2"), ("rceil", "even", "floor")),
        ("e2m1", "nvfp4"),
    }
)
TILE = 2048  #: elements of a program's tile, where groups are shorter
LONGEST = 8192  #: the longest group that fits one tile; in float32, twice that
WARP = 1024  #: elements of a tile for each warp; see `tiles`
ALIGNED = 16  #: bytes that are read at once
PLANS = 1024  #: shapes whose launches are planned
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a launch over a tensor needs and that follows from its shape, its type and the grid. See `_tile`, `constants`."""

    takes: bool
    tile: tuple[int, int, int, int] = (0, 0, 0, 0)
    count: int = 0
    full: bool = False
    constants: tuple[Any, ...] = ()
    scales: tuple[int, ...] = ()
    integer: bool = False
    symmetric: bool = False
    number: int = 0  #: the same for tensors that have one compiled form


@lru_cache(maxsize=PLANS)
def plan_of(shape: torch.Size, dtype: torch.dtype, grid: Grid) -> Plan:
    """The plan of a tensor of this shape and type; planned once, since an eager step asks for it at every input."""
    known = dtype in TYPES and (grid.element.name, grid.scale) in TAKES
    if not known or grid.group == "tensor" or not all(shape):
        return Plan(False)
    like = torch.empty(shape, dtype=dtype, device="meta")
    tile, count = tile_of(like, grid), count_of(like, grid)
    groups, group, width, _ = tile
    full = width == group and count % groups == 0
    return Plan(
        groups * group * dtype.itemsize % ALIGNED == 0, tile, count, full, constants(grid), grid.scale_shape(tuple(shape)),
        grid.element.kind == "integer", grid.symmetric, _numbers.setdefault((grid, dtype, tile, full), len(_numbers)),
    )  # fmt: skip


_numbers: dict[Any, int] = {}


@cache
def constants(grid: Grid) -> tuple[Any, ...]:
    """The constants of `grid` for the kernels, as the tuple `GRID` of `triton_arithmetic`."""
    element = grid.element
    low, high = (0, element.levels) if not grid.symmetric else (element.lowest, element.highest)
    return (
        grid.scale,
        STEP.get((element.name, grid.scale), 0.0),
        float(low),
        element.largest if element.kind == "float" else float(high),
        element.mantissa,
        element.min_exponent,
        element.max_exponent,
        elements.MIN_SCALE,
        elements.MIN_SCALE_CODE,
        elements.MAX_SCALE_CODE,
        elements.NVFP4_STEP,
        elements.MIN_BLOCK_SCALE,
        element.bits,
    )


def tiles(w: Tensor, grid: Grid) -> dict[str, int]:
    """The tile of a program: count of groups, their length, the power of two that holds all or a part of one, and warps."""
    return dict(zip(("GROUPS", "GROUP", "WIDTH", "num_warps"), tile_of(w, grid), strict=True))


def tile_of(w: Tensor, grid: Grid) -> tuple[int, int, int, int]:
    """As `tiles`, as a tuple."""
    longest = (
        LONGEST * 2 if w.dtype == torch.float32 else LONGEST
    )  # float32 is not converted, which takes fewer registers
    return _tile(group_of(w, grid), longest, extremes=2 if grid.scale in ("signed", "minmax") else 1)


@cache
def _tile(group: int, longest: int, *, extremes: int) -> tuple[int, int, int, int]:
    width = min(triton.next_power_of_2(group), longest)
    groups = max(1, (TILE if group > 16 else 2 * TILE) // width)
    warps = groups * width // WARP
    if group > longest and extremes == 1:  # one extreme to find: more warps are faster
        warps *= 2
    return groups, group, width, warps


def looks_first(grid: Grid) -> bool:
    """Whether scales depend on the largest magnitude of the tensor."""
    return grid.scale == "nvfp4"


def group_of(w: Tensor, grid: Grid) -> int:
    """The length of a group of `w`."""
    return w.shape[-1] if grid.group == "row" else int(grid.group)


def count_of(w: Tensor, grid: Grid) -> int:
    """How many groups `w` has."""
    return w.numel() // group_of(w, grid)
