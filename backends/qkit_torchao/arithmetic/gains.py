"""`qkit.reference.gains` in torch, bit for bit: scales and biases of codes, moved by numbers that train."""

from dataclasses import replace

import torch
from torch import Tensor

from qkit.element import MIN_SCALE
from qkit.qtensor import QTensor
from qkit.reference.gains import FARTHEST, LARGEST, LIMITS, SHIFT, SMALLEST, UNIT, stored_type
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.merged import shorten, stored
from qkit_torchao.arithmetic.stored import quotient, requantize

ROWS = 512  #: of a weight whose gradient is in memory at once


def new_codes(w: Tensor, like: QTensor[Tensor]) -> QTensor[Tensor]:
    """The codes of finite `w` [rows, n] on the read grid of `like`, before gains. Where there are biases, on `widened` scales."""
    return requantize(w, like if like.biases is None else widened(w, like))


def widened(w: Tensor, like: QTensor[Tensor]) -> QTensor[Tensor]:
    """`like`, of integers with biases, with the scale and the bias of each group whose values in `w` would be clipped."""
    levels, u = like.grid.element.levels, quotient(w, like)
    low = (u.amin(dim=-1) + 0.5).clamp(-FARTHEST, 0.0)
    high = (u.amax(dim=-1) - 0.5).clamp(levels, levels + FARTHEST)
    span = high - low
    return _scaled(like, torch.where(span == levels, 1.0, span * (1 / levels)), low)


def gained(q: QTensor[Tensor], gains: Tensor) -> QTensor[Tensor]:
    """`q` [rows, n] with scales multiplied by 1 + UNIT * their gain, and biases moved, both rounded to their type.

    Args:
        gains: [rows, groups or 1, numbers].
    """
    numbers = gains.detach().float()
    factors = (1 + UNIT * numbers[..., 0]).clamp(*LIMITS)
    if q.grid.read:
        return _scaled(q, factors, SHIFT * numbers[..., 1] if gains.shape[-1] == 2 else None)
    s = _limited(q.scales.float() * factors, q)
    made = stored(s, rounding.DTYPE[stored_type(q)]).to(q.scales.dtype)
    return replace(q, scales=torch.where(s.abs() < MIN_SCALE, torch.where(s < 0, -MIN_SCALE, MIN_SCALE), made))


def _scaled(q: QTensor[Tensor], factors: Tensor, shift: Tensor | None) -> QTensor[Tensor]:
    kind, before, biases = rounding.DTYPE[stored_type(q)], q.scales.float(), q.biases
    s = stored(_limited(before * factors, q), kind).to(q.scales.dtype)
    scales = torch.where(before.abs() < SMALLEST, q.scales, s)
    if biases is not None and shift is not None:
        by = shorten(before) * shorten(shift.clamp(-FARTHEST, FARTHEST))
        b = _flushed(_limited(_flushed(biases.float()) + by, q))
        biases = torch.where(by.abs() < SMALLEST, biases, stored(b, kind).to(biases.dtype))
    return replace(q, scales=scales, biases=biases)


def _limited(x: Tensor, q: QTensor[Tensor]) -> Tensor:
    return x.clamp(-LARGEST[stored_type(q)], LARGEST[stored_type(q)])


def _flushed(x: Tensor) -> Tensor:
    return torch.where(x.abs() < SMALLEST, 0.0, x)


def slopes(q: QTensor[Tensor]) -> Tensor:
    """The values [rows, n] of `q` without its biases, in float32: how they grow with the factors of their scales."""
    biases = None if q.biases is None else torch.zeros_like(q.biases)
    return rounding.dequantize(replace(q, biases=biases, dtype="float32"))


def to_gains(rows: Tensor, seen: Tensor, along: Tensor, scales: Tensor | None, gains: Tensor) -> Tensor:
    """The gradient of `gains`, from that of outputs [n, rows] and from inputs [n, inputs].

    Args:
        along: the slopes [rows, inputs] of the codes without gains.
        scales: those of the codes, without gains, where biases have gains too.
    """
    if gains.shape[1:] == (1, 1):  # one for each row, so that no gradient of a weight is needed
        return (UNIT * (rows.float() * (seen @ along.to(seen.dtype).T)).sum(dim=0))[:, None, None]
    found = torch.empty(gains.shape, dtype=torch.float32, device=gains.device)
    for some in (slice(first, first + ROWS) for first in range(0, len(gains), ROWS)):
        to_values = (rows[:, some].T @ seen).float()
        for number, one in enumerate((to_values * along[some], to_values)[: gains.shape[2]]):
            found[some, :, number] = one.unflatten(1, (gains.shape[1], -1)).sum(dim=-1)
    found[..., 0] *= UNIT
    if gains.shape[2] == 2:
        assert scales is not None
        found[..., 1] *= SHIFT * scales.float()
    return found
