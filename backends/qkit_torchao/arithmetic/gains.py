"""`qkit.reference.gains` in torch, bit for bit: scales of rows of codes, multiplied by numbers that train."""

from dataclasses import replace

import torch
from torch import Tensor

from qkit.element import MIN_SCALE
from qkit.qtensor import QTensor
from qkit.reference.gains import LARGEST, LIMITS, SMALLEST, UNIT, stored_type
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.merged import stored


def gained(q: QTensor[Tensor], gains: Tensor) -> QTensor[Tensor]:
    """`q` [rows, n] with the scales of each row multiplied by 1 + UNIT * its gain, float32 [rows]; rounded to their type."""
    kind, before = stored_type(q), q.scales.float()
    factors = (1 + UNIT * gains.detach().float()).clamp(*LIMITS)
    s = (before * factors[:, None]).clamp(-LARGEST[kind], LARGEST[kind])
    made = stored(s, rounding.DTYPE[kind]).to(q.scales.dtype)
    if q.grid.read:
        return replace(q, scales=torch.where(before.abs() < SMALLEST, q.scales, made))
    return replace(q, scales=torch.where(s.abs() < MIN_SCALE, torch.where(s < 0, -MIN_SCALE, MIN_SCALE), made))


def slopes(q: QTensor[Tensor]) -> Tensor:
    """The values [rows, n] of `q` without its biases, in float32: how they grow with the factors of their scales."""
    biases = None if q.biases is None else torch.zeros_like(q.biases)
    return rounding.dequantize(replace(q, biases=biases, dtype="float32"))
