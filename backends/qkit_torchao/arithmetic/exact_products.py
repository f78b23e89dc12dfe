"""Exact products and sums in fp64 on a torch device: `qkit.reference.products`, with the same bits."""

from collections.abc import Callable

import torch
from torch import Tensor

from qkit.errors import RangeError
from qkit.reference.products import BITS, BLOCK, LONGEST, PANEL

STRIP = 2048  #: columns that are updated in one product


def power(e: Tensor) -> Tensor:
    """2^e for integers, exactly."""
    return ((e.long() + 1023) << 52).view(torch.float64)


def shortened(a: Tensor, dim: int) -> Tensor:
    """`a` to 2^-20 of its largest magnitude along `dim`."""
    unit = power(torch.frexp(a.abs().amax(dim, keepdim=True)).exponent - BITS)
    return (a / unit).round_().mul_(unit)


def product(a: Tensor, b: Tensor, *, terms: int = LONGEST) -> Tensor:
    """a [n, k] times shortened b [k, m]; `a` is shortened. The product lies in memory as b does."""
    found, columns_first = None, b.stride(0) == 1
    for start in range(0, len(b), terms):
        of = slice(start, start + terms)
        part = shortened(b[of], 0)
        one = (part.T @ a[:, of].T).T if columns_first else a[:, of] @ part
        found = one if found is None else found.add_(one)
    assert found is not None
    return found


def halves(a: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`a`, split along `dim` into its high bits and the next."""
    unit = power(torch.frexp(a.abs().amax(dim, keepdim=True)).exponent - BITS)
    high = (a / unit).round() * unit
    unit = unit * 2.0**-BITS
    return high, ((a - high) / unit).round() * unit


def fine_product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] times b [k, m], to 2^-40; k is at most `LONGEST`."""
    (high, low), (top, rest) = halves(a, 1), halves(b, 0)
    return high @ top + (high @ rest).addmm_(low, top)  # that sum is exact, too


def total(x: Tensor) -> Tensor:
    """The sum of x [n, ...] over n, by halves."""
    n = len(x)
    size = 1 << (n - 1).bit_length()
    while size > 1:
        size //= 2
        if n > size:
            both, alone = x[: n - size] + x[size:n], x[n - size : size]
            n, columns_first = size, x.dim() == 2 and x.stride(0) == 1  # a sum lies in memory as its terms do
            x = torch.cat([both.T, alone.T], 1).T if columns_first else torch.cat([both, alone])
    return x[0]


def unit_upper(h: Tensor) -> Tensor:
    """The unit upper factor of h [n, n].

    Raises:
        RangeError: `h` has a negative direction.
    """
    a = h.flip(0, 1).contiguous()
    make_lower(a, _eliminate, take_product)
    a.tril_(-1).diagonal().fill_(1)
    return a.flip(0, 1)


def make_lower(
    a: Tensor,
    eliminate: Callable[[Tensor, Tensor, int, int, int], None],
    update: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """Makes of the lower half of a [n, n] that of its unit lower factor, in place.

    Args:
        eliminate, update: `_eliminate` and `take_product`, or faster forms of these.

    Raises:
        RangeError: `a` has a negative direction.
    """
    n, pivots = len(a), a.new_empty(len(a))
    for first in range(0, n, PANEL):
        last = min(first + PANEL, n)
        for start in range(first, last, BLOCK):
            eliminate(a, pivots, start, min(start + BLOCK, last), last)
        if last < n:
            update(a[last:, last:], a[last:, first:last], pivots[first:last])
    if not bool((pivots > 0).all()):
        raise RangeError(
            "the moments are not E[x x'] of any inputs, since they have a negative direction: sum them in fp32 or fp64"
        )


def take_product(a: Tensor, below: Tensor, pivots: Tensor) -> None:
    """Takes below * pivots * below' from the lower half of `a`: no more of it is used."""
    (high, low), (top, rest) = halves(below * pivots, 1), halves(below.T, 0)
    for start in range(0, len(a), STRIP):
        strip, under = slice(start, start + STRIP), slice(start, None)
        part = top[:, strip]
        a[under, strip] -= high[under] @ part + (high[under] @ rest[:, strip]).addmm_(low[under], part)


def _eliminate(a: Tensor, pivots: Tensor, start: int, end: int, last: int) -> None:
    """Eliminates columns start to end of `a`, and updates the columns after them up to `last`."""
    block, of_block = a[start:, start:end].T.contiguous(), pivots[start:end]
    for j in range(end - start):
        column = block[j, j + 1 :] / block[j, j]
        block[j + 1 :, j + 1 :] -= block[j, j + 1 : end - start][:, None] * column
        block[j, j + 1 :] = column
    of_block.copy_(block.diagonal())
    a[start:, start:end] = block.T
    if end < len(a):
        below = block[:, end - start :]
        a[end:, end:last] -= fine_product((below * of_block[:, None]).T, below[:, : last - end])
