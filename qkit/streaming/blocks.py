"""Quantizing a weight block by block of rows, with the codes of the whole weight, and the check of its values."""

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

#: By type: unsigned integers of its width; the pattern of infinity; the smallest pattern of a magnitude without codes.
PATTERNS: dict[str, tuple[Any, int, int]] = {
    "float32": (np.uint32, 0x7F800000, int(np.float32(LIMIT).view(np.uint32))),
    "bfloat16": (np.uint16, 0x7F80, int(np.float32(LIMIT).view(np.uint32)) >> 16),
    "float16": (np.uint16, 0x7C00, 0x7C00),
}


def sees_whole_tensor(grid: Grid) -> bool:
    """Whether scales depend on the extremes of the whole tensor, which then needs a pass before its first block."""
    return grid.group == "tensor" or grid.scale == "nvfp4"


def encode(
    w: NDArray[Any],
    grid: Grid,
    *,
    quantize: Quantize,
    extremes: tuple[float, float] | None = None,
    form: str = "",
) -> dict[str, NDArray[Any]]:
    """The stored parts of the block `w` [rows, n] of a larger weight, by the names of `compressed_tensors.store`.

    Args:
        quantize: a function with the bits of `reference.quantize` and `pack`.
        extremes: lowest and highest value of the whole tensor, where `sees_whole_tensor` is true; or of all tensors that share
            a tensor scale with it.
        form: see `compressed_tensors.store`.
    """
    rows = w.shape[0]
    if extremes is not None:  # in two rows of their own: scales depend on no other value outside the block
        w = np.concatenate([w, np.full((2, w.shape[1]), np.array(extremes)[:, None], w.dtype)])
    parts = compressed_tensors.store(quantize(w, grid), form)
    return {name: part[:rows] if part.ndim == 2 and extremes else part for name, part in parts.items()}


def check_codable(w: NDArray[Any], *, name: str, first: int, shape: tuple[int, ...]) -> None:
    """Checks that all values of `w` have codes. `w` is part of tensor `name` of `shape`, from its element `first` on.

    Raises:
        RangeError: a value is NaN, infinite, or at least 2^127 in magnitude; the message has its index.
    """
    _check(w, PATTERNS[w.dtype.name][2], "below 2^127 have codes", name, first, shape)


def check_finite(w: NDArray[Any], *, name: str, first: int, shape: tuple[int, ...]) -> None:
    """As `check_codable`, for tensors that are copied: refuses NaN and infinity only."""
    _check(w, PATTERNS[w.dtype.name][1], "are copied", name, first, shape)


def _largest(w: NDArray[Any], bits: NDArray[Any], sign: int) -> int:
    """The largest pattern in `bits` without sign bits. The patterns of NaN are the largest of all."""
    if native.available():
        return int(np.abs(np.array(native.extremes(w), w.dtype)).view(bits.dtype).max())
    return int(max(bits.view(f"i{w.itemsize}").max(), int(bits.max()) - sign))


def _check(w: NDArray[Any], least: int, wanted: str, name: str, first: int, shape: tuple[int, ...]) -> None:
    bits = w.view(PATTERNS[w.dtype.name][0])
    sign = 1 << 8 * w.itemsize - 1
    if bits.size and _largest(w, bits, sign) >= least:
        at = int(np.argmax((bits & bits.dtype.type(sign - 1)) >= least))
        place = [int(i) for i in np.unravel_index(first + at, shape)]
        raise RangeError(
            f"{name} holds {float(w.reshape(-1)[at]):g} at {place}: only finite values {wanted}; find its origin"
        )
