"""`qkit.reference.stored` in torch, function by function, bit for bit: new codes on scales that are already there."""

from dataclasses import replace

import torch
from torch import Tensor

from qkit.qtensor import QTensor, dtype_of
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.read_scales import alone
from qkit_torchao.arithmetic.rounding import FLOAT8, each


def requantize(w: Tensor, like: QTensor[Tensor]) -> QTensor[Tensor]:
    """The codes of finite `w` [..., n], whose shape is that of `like`, on the scales of `like`, in the type of `w`."""
    codes = _codes(_grouped(w.detach(), like), like)
    return replace(like, codes=codes.to(like.codes.dtype).reshape(w.shape), dtype=dtype_of(w))


def fake_requantize(w: Tensor, like: QTensor[Tensor]) -> Tensor:
    """`dequantize(requantize(w, like))`, bit for bit. A NaN or an infinity makes itself NaN."""
    finite = torch.isfinite(w)
    values = rounding.dequantize(requantize(torch.where(finite, w, 0.0), like))
    return torch.where(finite, values, torch.nan)


def unclipped(w: Tensor, like: QTensor[Tensor]) -> Tensor:
    """Where `w` [..., n] rounds to a code on the scales of `like` without being clipped."""
    x, element = _grouped(w.detach(), like), like.grid.element
    if element.kind == "float":
        inside = x.abs() <= each(element.largest * _steps(like).abs())
    else:
        q, lowest = _quotient(x, like), element.lowest if like.grid.symmetric else 0
        inside = (q >= lowest) & (q <= lowest + element.levels)
    return inside.reshape(w.shape)


def _grouped(w: Tensor, like: QTensor[Tensor]) -> Tensor:
    return w.to(torch.float32).reshape(like.grid.group_shape(tuple(w.shape)))


def _codes(x: Tensor, like: QTensor[Tensor]) -> Tensor:
    element, s = like.grid.element, _steps(like)
    if element.name == "e2m1":
        return rounding.e2m1_codes(x * each(s.sign()), s.abs())
    if element.kind == "float":
        y = alone("divide", x, each(s)).clamp(-element.largest, element.largest)
        return y.to(FLOAT8[element.name]).view(torch.uint8)
    lowest = element.lowest if like.grid.symmetric else 0
    return _quotient(x, like).clamp(lowest, lowest + element.levels)


def _quotient(x: Tensor, like: QTensor[Tensor]) -> Tensor:
    """The code of each value as a float, before it is clipped: fl(fl(x - bias) / s) to nearest even, plus the zero point."""
    if like.biases is not None:
        x = x - each(like.biases.to(torch.float32))
    q = torch.round(alone("divide", x, each(_steps(like))))
    return q if like.zeros is None else q + each(like.zeros.to(torch.float32))


def _steps(like: QTensor[Tensor]) -> Tensor:
    s = rounding.scale_values(like)
    return torch.where(s == 0, torch.inf, s)
