"""Row blocks: a tensor that is quantized a few rows at a time has the codes that it would have at once."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit import native
from qkit.element import LIMIT
from qkit.errors import RangeError
from qkit.formats import compressed_tensors
from qkit.grid import Grid
from qkit.reference.packing import Packed

Quantize = Callable[[NDArray[Any], Grid], Packed]

#: By type: the unsigned integers of its bits; among them, the infinity; and the least that has no codes.
PATTERNS: dict[str, tuple[Any, int, int]] = {
    "float32": (np.uint32, 0x7F800000, int(np.float32(LIMIT).view(np.uint32))),
    "bfloat16": (np.uint16, 0x7F80, int(np.float32(LIMIT).view(np.uint32)) >> 16),
    "float16": (np.uint16, 0x7C00, 0x7C00),
}


def sees_whole_tensor(grid: Grid) -> bool:
    """Whether scales depend on the tensor's extremes, so that it is looked through before its first block is quantized."""
    return grid.group == "tensor" or grid.scale == "nvfp4"


def encode(
    w: NDArray[Any], grid: Grid, *, quantize: Quantize, extremes: tuple[float, float] | None = None
) -> dict[str, NDArray[Any]]:
    """The stored parts of the block `w` [rows, n] of a larger tensor, as `compressed_tensors.store` names them.

    Args:
        quantize: `reference.quantize` and `pack`, or what gives the same bits.
        extremes: of the whole tensor, least and greatest, where the grid sees it.
    """
    rows = w.shape[0]
    if extremes is not None:  # they ride along in rows of their own, for scales depend on nothing else
        w = np.concatenate([w, np.full((2, w.shape[1]), np.array(extremes)[:, None], w.dtype)])
    parts = compressed_tensors.store(quantize(w, grid))
    return {name: part[:rows] if part.ndim == 2 and extremes else part for name, part in parts.items()}


def check_codable(w: NDArray[Any], *, name: str, first: int, shape: tuple[int, ...]) -> None:
    """Refuses a stretch of tensor `name` of `shape`, from its element `first` on, that holds what has no codes.

    Raises:
        RangeError: a NaN, an infinity, or a magnitude of 2^127 and more; the message says where.
    """
    _check(w, PATTERNS[w.dtype.name][2], "below 2^127 have codes", name, first, shape)


def check_finite(w: NDArray[Any], *, name: str, first: int, shape: tuple[int, ...]) -> None:
    """As `check_codable`, but refuses NaN and infinities alone."""
    _check(w, PATTERNS[w.dtype.name][1], "are copied", name, first, shape)


def _largest(w: NDArray[Any], bits: NDArray[Any], sign: int) -> int:
    """The largest pattern in `bits`, signs set aside; those of NaN are the largest of all."""
    if native.available():
        return int(np.abs(np.array(native.extremes(w), w.dtype)).view(bits.dtype).max())
    return int(max(bits.view(f"i{w.itemsize}").max(), int(bits.max()) - sign))


def _check(w: NDArray[Any], least: int, what: str, name: str, first: int, shape: tuple[int, ...]) -> None:
    bits = w.view(PATTERNS[w.dtype.name][0])
    sign = 1 << 8 * w.itemsize - 1
    if bits.size and _largest(w, bits, sign) >= least:
        at = int(np.argmax((bits & bits.dtype.type(sign - 1)) >= least))
        place = [int(i) for i in np.unravel_index(first + at, shape)]
        raise RangeError(
            f"{name} holds {float(w.reshape(-1)[at]):g} at {place}: only finite values {what}; find what made it"
        )
