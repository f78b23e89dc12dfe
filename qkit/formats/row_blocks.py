"""A stored weight in blocks of its rows: where blocks begin, and which rows of each stored part belong to a block."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit import native
from qkit.reference import packing

#: About how many numbers a block has: larger blocks do not fit into the caches, smaller ones cost more calls.
ELEMENTS: Final = 1 << 20 if native.available() else 1 << 18
ROWS: Final = 32  #: blocks begin at multiples of it, so that zero points, packed down the rows, fill whole words


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First row of each block of a weight [rows, n], and the first row after the block."""
    rows, n = shape
    step = max(ELEMENTS // n // ROWS, 1) * ROWS
    for begin in range(0, rows, step):
        yield begin, min(begin + step, rows)


def part_rows(part: tuple[int, ...], begin: int, *, shape: tuple[int, ...], bits: int) -> int | None:
    """The first row, in a stored part, of a block that begins at row `begin` of the weight.

    None where every block gives the same whole part, of which the first is enough.

    Args:
        part: shape of the stored part.
        shape: of the weight.
        bits: of its codes.
    """
    if len(part) < 2:
        return None if begin else 0
    return begin if part[0] == shape[0] else begin * bits // packing.WORD_BITS  # zero points are packed down the rows


def rows_of(
    parts: Mapping[str, NDArray[Any]], begin: int, end: int, *, shape: tuple[int, ...], bits: int
) -> dict[str, NDArray[Any]]:
    """The stored parts of rows `begin` to `end` of a weight of `shape`, out of the parts of the whole weight."""
    rows, out = shape[0], {}
    for name, part in parts.items():
        if part.ndim < 2:
            out[name] = np.array([end - begin, *shape[1:]]) if name == "weight_shape" else part
        elif part.shape[0] == rows:
            out[name] = part[begin:end]
        else:
            out[name] = part[begin * bits // packing.WORD_BITS : packing.words(end, bits)]
    return out
