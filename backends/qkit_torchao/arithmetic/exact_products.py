"""Exact products and sums in fp64 on a torch device: `qkit.reference.products`, with the same bits."""

import torch
from torch import Tensor

from qkit.errors import RangeError
from qkit.reference.products import BITS, BLOCK, LONGEST

Halves = tuple[Tensor, Tensor]  #: a matrix as two, whose products have no rounding


def power(e: Tensor) -> Tensor:
    """2^e for integers, exactly."""
    return ((e.long() + 1023) << 52).view(torch.float64)


def halves(a: Tensor, dim: int) -> Halves:
    """`a`, split along `dim` into its high bits and the next."""
    unit = power(torch.frexp(a.abs().amax(dim, keepdim=True)).exponent - BITS)
    high = (a / unit).round() * unit
    unit = unit * 2.0**-BITS
    return high, ((a - high) / unit).round() * unit


def product(a: Tensor | Halves, b: Tensor) -> Tensor:
    """a [n, k] times b [k, m]."""
    high, low = a if isinstance(a, tuple) else halves(a, 1)
    total = torch.zeros(len(high), b.shape[1], dtype=torch.float64, device=b.device)
    for start in range(0, len(b), LONGEST):
        of = slice(start, start + LONGEST)
        top, rest = halves(b[of], 0)
        total += high[:, of] @ top + (high[:, of] @ rest).addmm_(low[:, of], top)  # that sum is exact, too
    return total


def total(x: Tensor) -> Tensor:
    """The sum of x [n, ...] over n, by halves."""
    n = len(x)
    size = 1 << (n - 1).bit_length()
    while size > 1:
        size //= 2
        if n > size:
            x, n = torch.cat([x[: n - size] + x[size:n], x[n - size : size]]), size
    return x[0]


def unit_upper(h: Tensor) -> Tensor:
    """The unit upper factor of h [n, n].

    Raises:
        RangeError: `h` has a negative direction.
    """
    a, n = h.flip(0, 1).contiguous(), len(h)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        panel = a[start:, start:end].T.contiguous()
        for j in range(end - start):
            column = panel[j, j + 1 :] / panel[j, j]
            panel[j + 1 :, j + 1 :] -= panel[j, j + 1 : end - start][:, None] * column
            panel[j, j + 1 :] = column
        pivots = panel.diagonal()[:, None].clone()
        if not bool((pivots > 0).all()):
            raise RangeError(
                "the moments are not E[x x'] of any inputs, since they have a negative direction: sum them in fp32 or fp64"
            )
        a[start:, start:end] = panel.T
        rest = panel[:, end - start :]
        if end < n:
            a[end:, end:] -= product((rest * pivots).T.contiguous(), rest)
    lower = torch.tril(a, -1)
    lower.diagonal().fill_(1)
    return lower.flip(0, 1).contiguous()
