"""The constants of products with packed codes on CUDA: how codes lie, and how programs share the work, see `codes.cuh`."""

from functools import cache
from typing import Any

from qkit.element import READ_RULES
from qkit.grid import Grid
from qkit_torchao.arithmetic import words

BROUGHT = 1 << 22  #: words of the largest weight that is brought to the second cache early
ZEROES = 32  #: see `few.cu`
MEMORY = 44 * 1024  #: bytes of shared memory that a program has beside its sums, everywhere
Constants = tuple[tuple[str, int], ...]
#: By number, as `codes.cuh` has them.
ELEMENTS = ("integer", "e2m1", "e4m3", "e5m2")


@cache
def geometry(grid: Grid, inputs: int) -> dict[str, Any]:
    """The constants of weights on `grid` with `inputs` columns."""
    high, *low = words.PLANES[grid.element.bits]
    unit = words.unit(grid, inputs)
    units = -(-inputs // unit)
    number = isinstance(grid.group, int)
    return {
        "INPUTS": inputs,
        "ELEMENT": "integer" if grid.element.kind == "integer" else grid.element.name,
        "HIGH": high,
        "LOW": low[0] if low else 0,
        "UNIT": unit,
        "UNITS": units,
        "GROUP": grid.group if number else units * unit,
        "GROUPS": inputs // int(grid.group) if number else int(grid.group == "row"),
        "SCALES": scales_of(grid),
    }


def scales_of(grid: Grid) -> str:
    """How a kernel finds the step of a group: from a `float`, or from a byte; bytes of files may be any, see `codes.cuh`."""
    if grid.stored_scales == "float" or not grid.read:
        return grid.stored_scales
    if grid.stored_scales == "e8m0":
        return "any e8m0"
    return "e4m3 over" if READ_RULES[grid.scale].inverse else "e4m3 times"


@cache
def product_geometry(
    grid: Grid, inputs: int, outputs: int, stride: int, eights: int, aligned: bool, processors: int, rows: int = 0
) -> tuple[Constants, tuple[int, int, int], dict[str, int]]:
    """The constants of `products.cu` that follow from a weight; its last numbers; outputs and threads of a program.

    Args:
        eights: rows of x over eight; 0 for `few.cu`, and then `rows` is their number.
    """
    known = geometry(grid, inputs)
    unit, high = known["UNIT"], known["HIGH"]
    across = known["UNITS"] * unit * high // 32
    safe = not aligned or inputs % unit != 0 or across % 4 != 0 or stride % 4 != 0
    tiles, warps, more = 1 if eights < 4 else 2, 0, {}
    if eights:
        planes = 2 if known["LOW"] else 1
        warps = _warps(across // 16, -(-outputs // (16 * tiles)), eights, processors, planes=planes)
    else:
        tiles, warps, keeps = _few(known, across // 16, -(-outputs // 16), processors)
        keeps = keeps and kept(grid, inputs, rows) <= MEMORY
        more = {"BRINGS": int(outputs * stride <= BROUGHT), "KEEPS": int(keeps)}
    constants = {
        "HIGH": high, "LOW": known["LOW"], "ELEMENT": ELEMENTS.index(known["ELEMENT"]), "UNIT": unit,
        "RATIO": grid.group // unit if isinstance(grid.group, int) else 0, "EIGHTS": max(1, eights), "TILES": tiles,
        "WARPS": warps, "SAFE": safe, "WHOLE": not safe and across % 16 == 0, **more,
    }  # fmt: skip
    shared = {"outputs": 16 * tiles, "threads": 32 * constants["WARPS"]}
    return tuple(constants.items()), (across, stride, known["GROUPS"]), shared


def rows_of_few(grid: Grid, inputs: int) -> int:
    """The most rows of x that `few.cu` takes: the eight columns of an instruction hold four lanes' groups of that many."""
    known = geometry(grid, inputs)
    words_of_unit: int = known["UNIT"] * known["HIGH"] // 32
    return {1: 0, 2: 1}.get(words_of_unit, 2)


def _few(known: dict[str, Any], blocks: int, tiles: int, processors: int) -> tuple[int, int, bool]:
    """TILES, WARPS and KEEPS of `few.cu` for so many tiles of 16 outputs. Those that were fastest on an H200.

    Few programs of many warps leave x time to be read once, for all warps; many programs would each read it.
    """
    high, low, integer = known["HIGH"], known["LOW"], known["ELEMENT"] == "integer"
    if tiles <= processors:
        tiles, warps, keeps = 1, 16, False
    elif tiles <= 2 * processors:
        wide = high < 8 and not low
        tiles, warps, keeps = (2 if wide else 1), (8 if low else 16), high == 4 and wide
    else:
        tiles, warps, keeps = (2 if integer and high < 8 and not low else 1), 4, False
    while warps > 2 and warps > blocks:
        warps //= 2
    return tiles, warps, keeps


@cache
def kept(grid: Grid, inputs: int, rows: int) -> int:
    """Bytes of shared memory for so many rows of x, in whole blocks of 16 words, and for the zeros before them."""
    known = geometry(grid, inputs)
    block: int = 16 * 32 // known["HIGH"]
    columns: int = known["UNITS"] * known["UNIT"]
    return 16 * ZEROES + rows * -(-columns // block) * block * 2


def _warps(blocks: int, programs: int, eights: int, processors: int, *, planes: int) -> int:
    """Warps of each of `programs`, for rows of so many blocks of words. Those that were fastest on an H200.

    Two planes need twice the memory for copies, which holds two of each warp up to `most`.
    """
    if eights == 1 and programs > 2 * processors:
        return 4 if blocks >= 32 else 2  # a warp has some eight blocks
    if eights == 1:
        return 16 if blocks >= 64 or (blocks >= 32 and programs < processors) else 8
    most, resident = (8, 28) if eights == 2 else (min(32 // eights, 8 // planes), 8)
    return next((n for n in (8, 4) if n <= most and programs * n <= processors * resident and n <= blocks), 2)
