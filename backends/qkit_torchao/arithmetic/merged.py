"""The law of the merged weight (`qkit.reference.merged`) in torch, function by function; arrays only."""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.element import MIN_SCALE, Element
from qkit.qtensor import QTensor
from qkit.reference import merged as law
from qkit.reference.merged import DITHER, DROPPED
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.read_scales import alone
from qkit_torchao.arithmetic.scale_rules import bits


def added(w: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """V = W + scale * B A, in float32."""
    return w.float() + product(shorten(b.float() * scale), shorten(a.float()))


def dithered(q: QTensor[Tensor]) -> Tensor:
    """The values [outputs, inputs] of `q`, float32, each moved within its cell."""
    codes = q.codes.reshape(q.grid.group_shape(q.shape))
    d = dither(tuple(q.shape), codes.device).reshape(codes.shape)
    if q.grid.element.kind == "float":
        v, moved = _moved_floats(codes, d, q.grid.element)
    else:
        v = codes.float()
        v = v if q.zeros is None else v - rounding.each(q.zeros.float())
        moved = v + d
    if not q.grid.read:
        moved = torch.where(_outermost(v, symmetric=q.grid.symmetric), v, moved)
    values = moved * rounding.each(rounding.scale_values(q))
    if q.biases is not None:
        values = alone("add", values, rounding.each(q.biases.float()))
    return values.reshape(q.shape)


def dither(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Multiples of 2^-9 between -1/2 and 1/2, exclusive, for [outputs, inputs]."""
    rows, columns = (
        torch.arange(n, device=device, dtype=torch.int64) * step & 0xFFFFFFFF
        for n, step in zip(shape, DITHER, strict=True)
    )
    rows, columns = (
        one.sub(1 << 31).to(torch.int32) for one in (rows, columns)
    )  # the sum wraps, as that of 32 bits without sign
    levels = (rows[:, None] + columns) >> 24 & 0xFF
    return (levels.float() * 2 - 255) * 2.0**-9


def _outermost(v: Tensor, *, symmetric: bool) -> Tensor:
    if symmetric:
        return v.abs() == v.abs().amax(dim=-1, keepdim=True)
    return (v == v.amax(dim=-1, keepdim=True)) | (v == v.amin(dim=-1, keepdim=True))


def _moved_floats(codes: Tensor, d: Tensor, element: Element) -> tuple[Tensor, Tensor]:
    table = _magnitudes(element).to(codes.device)
    code, last = codes.int() & (1 << (element.bits - 1)) - 1, len(table) - 1
    sign = torch.where((codes.int() >> (element.bits - 1) & 1) != 0, -1.0, 1.0)
    size, along = table[code], d * sign
    up, down = table[(code + 1).clamp_max(last)] - size, size - table[code.clamp_min(1) - 1]
    gap = torch.where(((along > 0) & (code < last)) | (code == 0), up, down)
    return sign * size, sign * (size + along * gap)


@cache
def _magnitudes(element: Element) -> Tensor:
    return torch.from_numpy(law.magnitudes(element))


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
