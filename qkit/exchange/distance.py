"""The distance of the values of one tensor from those of another: MSE, SQNR, cosine and largest error."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, log10, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Distance:
    """Errors of a second tensor from a first one, in float64.

    Attributes:
        mse: mean of the squared differences.
        sqnr: power of the first tensor over that of the differences, in dB: 10 log10(sum a^2 / sum (a - b)^2). None: infinite,
            since no value differs, or not a number.
        cosine: of the angle between the two tensors as vectors; 1 where both are zero, 0 where one is.
        largest: the largest magnitude of a difference.
    """

    mse: float
    sqnr: float | None
    cosine: float
    largest: float


def measure(blocks: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> Distance:
    """The errors of the second of each pair of blocks from the first. Sums are in float64."""
    count, noise, signal, other, product, largest = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    for first, second in blocks:
        a, b = first.astype(np.float64).reshape(-1), second.astype(np.float64).reshape(-1)
        apart = a - b
        count += a.size
        noise, signal = noise + float(apart @ apart), signal + float(a @ a)
        other, product = other + float(b @ b), product + float(a @ b)
        largest = max(largest, float(np.abs(apart).max(initial=0.0)))
    length = sqrt(signal) * sqrt(other)
    cosine = product / length if length else float(signal == other)
    ratio = signal / noise if noise else inf
    sqnr = 10 * log10(ratio) if 0 < ratio < inf else None
    return Distance(noise / max(count, 1), sqnr, cosine, largest)
