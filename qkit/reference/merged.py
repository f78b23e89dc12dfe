"""The merged weight in NumPy: the law of adapters, which every engine follows bit for bit.

Matrix products differ in their last bits between engines, devices and shapes, and a last bit may flip a code. So factors are
shortened to 12 significant bits, so that every product of two is exact in float32, and sums have one order. Each engine then
computes the same merged weight, fused or not, compiled or not. Exact but for products below 2^-126, which no grid can see.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.adapters.update import Floats, Update
from qkit.element import MIN_SCALE

DROPPED = 12  #: of float32's 24 significant bits


def merged(w: NDArray[Any], update: Update) -> Floats:
    """The weight [outputs, inputs] that a layer with base weight `w` and an adapter trains with, before its grid; float32.

    LoRA: W + scale * B A. DoRA: m * V / ||V|| by rows, with V = W + scale * B A.
    """
    v = w.astype(np.float32) + product(shorten(update.b * np.float32(update.scale)), shorten(update.a))
    if update.magnitude is None:
        return v
    return v * (update.magnitude / row_norms(v))[:, None]


def product(b: Floats, a: Floats) -> Floats:
    """B A of shortened factors [outputs, rank] and [rank, inputs], summed from the first column of B to the last."""
    total = b[:, :1] * a[:1]
    for k in range(1, len(a)):
        total = total + b[:, k : k + 1] * a[k : k + 1]
    return total


def row_norms(v: Floats) -> Floats:
    """Lengths [outputs] of the rows of `v`, shortened; at least 2^-96. Squares are summed by halves: i and i + n/2, and so on."""
    squares = shorten(v) ** 2
    n = 1 << (v.shape[1] - 1).bit_length()
    squares = np.pad(squares, ((0, 0), (0, n - v.shape[1])))
    while n > 1:
        n //= 2
        squares = squares[:, :n] + squares[:, n:]
    return np.maximum(np.sqrt(squares[:, 0]), np.float32(MIN_SCALE))


def shorten(x: Floats) -> Floats:
    """`x` with 12 significant bits, ties to even. In integers, which compilers do not rewrite."""
    u = np.ascontiguousarray(x).view(np.uint32)
    return ((u + np.uint32((1 << DROPPED - 1) - 1) + (u >> DROPPED & 1)) & np.uint32(-1 << DROPPED & 0xFFFFFFFF)).view(
        np.float32
    )
