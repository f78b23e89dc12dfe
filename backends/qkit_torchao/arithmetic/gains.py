"""`qkit.reference.gains` in torch, bit for bit: scales and biases of codes, moved by numbers that train."""

from dataclasses import replace

import torch
from torch import Tensor

from qkit.element import MIN_SCALE
from qkit.qtensor import QTensor
from qkit.reference.gains import FARTHEST, LARGEST, LIMITS, NARROW, SHIFT, SMALLEST, UNIT, stored_type
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.merged import shorten, stored

ROWS = 512  #: of a weight whose gradient is in memory at once


def gained(q: QTensor[Tensor], gains: Tensor) -> QTensor[Tensor]:
    """`q` [rows, n] with scales multiplied by 1 + UNIT * their gain, and biases moved, both rounded to their type.

    Args:
        gains: [rows, groups or 1, numbers].
    """
    kind, before, numbers = stored_type(q), q.scales.float(), gains.detach().float()
    factors = (1 + UNIT * numbers[..., 0]).clamp(*(NARROW if q.grid.read else LIMITS))
    s = (before * factors).clamp(-LARGEST[kind], LARGEST[kind])
    made = stored(s, rounding.DTYPE[kind]).to(q.scales.dtype)
    if q.grid.read:
        scales = torch.where(before.abs() < SMALLEST, q.scales, made)
        return replace(q, scales=scales, biases=_moved(q, numbers))
    return replace(q, scales=torch.where(s.abs() < MIN_SCALE, torch.where(s < 0, -MIN_SCALE, MIN_SCALE), made))


def _moved(q: QTensor[Tensor], gains: Tensor) -> Tensor | None:
    if q.biases is None or gains.shape[-1] == 1:
        return q.biases
    kind = stored_type(q)
    shift = (SHIFT * gains[..., 1]).clamp(-FARTHEST, FARTHEST)
    by = shorten(q.scales.float()) * shorten(shift)
    b = (_flushed(q.biases.float()) + by).clamp(-LARGEST[kind], LARGEST[kind])
    return torch.where(by.abs() < SMALLEST, q.biases, stored(_flushed(b), rounding.DTYPE[kind]).to(q.biases.dtype))


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
