"""The law of the merged weight (`qkit.reference.merged`) in torch, function by function; arrays only."""

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.element import MIN_SCALE
from qkit.reference.merged import DROPPED
from qkit_torchao.arithmetic.scale_rules import bits


def added(w: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """V = W + scale * B A, in float32."""
    return w.float() + product(shorten(b.float() * scale), shorten(a.float()))


def product(b: Tensor, a: Tensor) -> Tensor:
    """B A of shortened factors [..., outputs, rank] and [..., rank, inputs], summed from the first column of B to the last."""
    total = b[..., :1] * a[..., :1, :]
    for k in range(1, a.shape[-2]):
        total = torch.addcmul(total, b[..., k : k + 1], a[..., k : k + 1, :])
    return total


def row_norms(v: Tensor) -> Tensor:
    """Lengths [..., outputs] of the rows of `v`, shortened; at least 2^-96."""
    squares = shorten(v).square()
    n = 1 << (v.shape[-1] - 1).bit_length()
    squares = F.pad(squares, (0, n - v.shape[-1]))
    while n > 1:
        n //= 2
        squares = squares[..., :n] + squares[..., n:]
    return squares[..., 0].double().sqrt().float().clamp_min(MIN_SCALE)


def stretch(magnitude: Tensor, norms: Tensor) -> Tensor:
    """magnitude / norms. As the root above in float64, where an ulp more or less does not reach the float32 it is rounded to:
    torch's own roots in float32 are not those of IEEE, nor are a GPU's quotients once compiled.
    """
    return (magnitude.double() / norms.double()).float()


def shorten(x: Tensor) -> Tensor:
    """`x` with 12 significant bits, ties to even."""
    return _significant(x, DROPPED)


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 `x` rounded to `dtype`, also where a compiler takes a cast down and up again for nothing."""
    if dtype == torch.bfloat16:
        x = _significant(x, 16)
    elif dtype == torch.float16:
        x = torch.where(x.abs() < 2.0**-14, torch.round(x * 2.0**24) * 2.0**-24, _significant(x, 13))
    return x.to(dtype)


def _significant(x: Tensor, dropped: int) -> Tensor:
    u = bits(x.contiguous())
    return ((u + ((1 << dropped - 1) - 1) + ((u >> dropped) & 1)) & ~((1 << dropped) - 1)).view(torch.float32)
