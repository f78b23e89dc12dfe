"""Weights of small floats with any kind of scale: fp8 by blocks, channels or tensors, NVFP4 and MXFP4, in every layout.

Read off transformers 5.23 (`finegrained_fp8.py`, `mxfp4.py`), compressed-tensors 0.20 and ModelOpt's unified checkpoints.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qkit.formats.packed import Tensors
from qkit.sources.law import Codes


@dataclass(frozen=True, slots=True)
class Floats:
    """A weight of e2m1 or float8 codes.

    Attributes:
        title: of the layout.
        element: `e2m1`, two codes in a byte, the first in the low bits; `e4m3` or `e5m2`.
        block: rows and columns that share a scale.
        codes_in, scales_in: names of the tensors.
        factor: name of the tensor with one scale for all; empty where there is none.
        divides: whether that tensor divides.
        stacked: whether the tensors have one matrix for each expert.
    """

    title: str
    element: str
    block: tuple[int, int]
    codes_in: str
    scales_in: str
    factor: str = ""
    divides: bool = False
    stacked: bool = False

    @property
    def name(self) -> str:
        """See `Form`."""
        return self.title

    def codes(self, parts: Tensors, rows: slice, matrix: int) -> Codes:
        """See `Form`."""
        stored, scales = (
            parts[name][matrix] if self.stacked else parts[name] for name in (self.codes_in, self.scales_in)
        )
        down, rows_in_all = self.block[0], stored.shape[0]
        begin, stop, step = rows.indices(rows_in_all)
        some = np.ascontiguousarray(stored[begin:stop:step]).reshape(len(range(begin, stop, step)), -1).view(np.uint8)
        scales = scales.reshape(-(-rows_in_all // down), -1)
        if scales.shape[0] > 1:
            scales = scales[np.arange(begin, stop, step) // down]  # a scale for each row from here on
        factor = parts[self.factor].reshape(-1)[:1].astype(np.float32)[0] if self.factor else None
        return Codes(
            self.element,
            nibbles(some) if self.element == "e2m1" else some,
            scales,
            (1, self.block[1]),
            tensor_scale=None if self.divides else factor,
            divisor=factor if self.divides else None,
        )


def nibbles(pairs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes of 4 bits [..., 2 * n] out of bytes [..., n], the low bits first."""
    both = np.stack((pairs & np.uint8(15), pairs >> np.uint8(4)), axis=-1)
    return both.reshape(*pairs.shape[:-1], -1)
