"""Matrix products and factors in fp64 whose bits depend on no library, thread count or machine.

A BLAS adds in an order of its own. Here every operand is a sum of two arrays of integers of 20 bits times powers of two. Their
products, and sums of up to 4,096 of them, fit into 53 bits: each partial sum is exact, so that the order of addition is nothing.
The error is about 2^-40 of the largest product. Everything else is elementwise, and IEEE 754 defines its bits.
"""

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Halves = tuple[Doubles, Doubles]

BITS = 20  #: of one part: 2 * 20 bits of a product, and 12 of a sum of 4,096, are 52
LONGEST = 4096  #: terms of one exact sum
BLOCK = 64  #: columns that are eliminated before the rest of a matrix is updated in one product


def halves(a: Doubles, axis: int) -> Halves:
    """Two arrays whose sum is `a` to 2^-40 of the largest magnitude along `axis`, which a product sums over."""
    peak = np.abs(a).max(axis=axis, keepdims=True)
    unit = np.ldexp(1.0, np.frexp(peak)[1] - BITS)
    high = np.rint(a / unit) * unit
    unit = unit * 2.0**-BITS
    return high, np.rint((a - high) / unit) * unit


def product(a: Doubles | Halves, b: Doubles) -> Doubles:
    """a @ b of finite [m, k] and [k, n], with the same bits everywhere; `a` may be `halves(a, axis=1)`, or a part of them."""
    high, low = a if isinstance(a, tuple) else halves(a, axis=1)
    total = np.zeros((high.shape[0], b.shape[1]))
    for start in range(0, b.shape[0], LONGEST):
        of = slice(start, start + LONGEST)
        top, rest = halves(b[of], axis=0)
        total += high[:, of] @ top + (high[:, of] @ rest + low[:, of] @ top)
    return total


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
    n = len(a)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        panel = np.ascontiguousarray(a[start:, start:end].T)  # [columns of the block, rows from its first on]
        for j in range(end - start):
            pivot = panel[j, j]
            if not pivot > 0:
                raise ArithmeticError("the matrix is not positive definite")
            column = panel[j, j + 1 :] / pivot
            panel[j + 1 :, j + 1 :] -= panel[j, j + 1 : end - start][:, None] * column
            panel[j, j + 1 :] = column
        pivots = panel.diagonal()[:, None].copy()
        a[start:, start:end] = panel.T
        rest = panel[:, end - start :]
        if end < n:
            a[end:, end:] -= product((rest * pivots).T, rest)
    lower: NDArray[Any] = np.tril(a, -1)
    lower[np.diag_indices(n)] = 1
    return np.ascontiguousarray(lower[::-1, ::-1])
