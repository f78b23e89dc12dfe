"""Matrix products and factors in fp64 whose bits depend on no library, thread count or machine.

A BLAS adds in an order of its own. Here every operand is an array of integers of 20 bits times powers of two, or a sum of two of
these. Their products, and sums of up to 4,096 of them, fit into 53 bits: each partial sum is exact, so that the order of addition
is nothing. The error is about 2^-20 of the largest product, or 2^-40 of it. Everything else is elementwise, and IEEE 754 defines
its bits.
"""

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

BITS = 20  #: of one part: 2 * 20 bits of a product, and 12 of a sum of 4,096, are 52
LONGEST = 4096  #: terms of one exact sum
BLOCK = 64  #: columns that are eliminated before others of their panel are updated
PANEL = 1024  #: columns that are eliminated before the rest of a matrix is updated in one product


def shortened(a: Doubles, axis: int) -> Doubles:
    """`a` to 2^-20 of the largest magnitude along `axis`, which a product sums over."""
    unit = np.ldexp(1.0, np.frexp(np.abs(a).max(axis=axis, keepdims=True))[1] - BITS)
    return cast(Doubles, np.rint(a / unit) * unit)


def product(a: Doubles, b: Doubles, *, terms: int = LONGEST) -> Doubles:
    """a @ shortened(b) of finite [m, k] and [k, n], with the same bits everywhere; `a` is `shortened` along its rows.

    Args:
        terms: of a sum whose terms of `b` are shortened together.
    """
    found = np.zeros((a.shape[0], b.shape[1]))
    for start in range(0, b.shape[0], terms):
        of = slice(start, start + terms)
        found += a[:, of] @ shortened(b[of], axis=0)
    return found


def fine_product(a: Doubles, b: Doubles) -> Doubles:
    """a @ b of finite [m, k] and [k, n], to 2^-40, with the same bits everywhere; k is at most `LONGEST`."""
    (high, low), (top, rest) = _halves(a, axis=1), _halves(b, axis=0)
    return high @ top + (high @ rest + low @ top)


def total(x: Doubles) -> Doubles:
    """The sum over the first axis, by halves: i with i + n/2, after zeros to a power of two."""
    n = x.shape[0]
    size = 1 << (n - 1).bit_length()
    while size > 1:
        size //= 2
        if n > size:
            x = np.concatenate([x[: n - size] + x[size:n], x[n - size : size]])
            n = size
    return cast(Doubles, x[0])


def unit_upper(h: Doubles) -> Doubles:
    """The upper U with ones on its diagonal, and h = U D U' for a diagonal D, of positive definite `h` [n, n].

    Raises:
        ArithmeticError: `h` is not positive definite.
    """
    a = np.ascontiguousarray(h[::-1, ::-1])  # from its last row on: the lower factor of the reversed matrix
    n, pivots = len(a), np.empty(len(a))
    for first in range(0, n, PANEL):
        last = min(first + PANEL, n)
        for start in range(first, last, BLOCK):
            end = min(start + BLOCK, last)
            block = np.ascontiguousarray(a[start:, start:end].T)  # [columns of the block, rows from its first on]
            _eliminate(block)
            pivots[start:end] = block.diagonal()
            a[start:, start:end] = block.T
            below = block[:, end - start :]
            a[end:, end:last] -= fine_product((below * pivots[start:end, None]).T, below[:, : last - end])
        below = a[last:, first:last].T
        a[last:, last:] -= fine_product((below * pivots[first:last, None]).T, below)
    lower: NDArray[Any] = np.tril(a, -1)
    lower[np.diag_indices(n)] = 1
    return np.ascontiguousarray(lower[::-1, ::-1])


def _eliminate(block: Doubles) -> None:
    count = len(block)
    for j in range(count):
        pivot = block[j, j]
        if not pivot > 0:
            raise ArithmeticError("the matrix is not positive definite")
        column = block[j, j + 1 :] / pivot
        block[j + 1 :, j + 1 :] -= block[j, j + 1 : count][:, None] * column
        block[j, j + 1 :] = column


def _halves(a: Doubles, axis: int) -> tuple[Doubles, Doubles]:
    """Two arrays whose sum is `a` to 2^-40 of the largest magnitude along `axis`."""
    unit = np.ldexp(1.0, np.frexp(np.abs(a).max(axis=axis, keepdims=True))[1] - BITS)
    high = np.rint(a / unit) * unit
    unit = unit * 2.0**-BITS
    return high, np.rint((a - high) / unit) * unit
