"""`qkit.reference.gains` in MLX, bit for bit: scales of rows of codes, multiplied by numbers that train."""

from dataclasses import replace

import mlx.core as mx

from qkit.element import MIN_SCALE
from qkit.qtensor import QTensor
from qkit.reference.gains import LARGEST, LIMITS, SMALLEST, UNIT, stored_type
from qkit_mlx.arithmetic import rounding
from qkit_mlx.arithmetic.merged import stored


def gained(q: QTensor[mx.array], gains: mx.array) -> QTensor[mx.array]:
    """`q` [rows, n] with the scales of each row multiplied by 1 + UNIT * its gain, float32 [rows]; rounded to their type."""
    kind, before = stored_type(q), q.scales.astype(mx.float32)
    factors = mx.clip(1 + UNIT * gains.astype(mx.float32), *LIMITS)
    s = mx.clip(before * factors[:, None], -LARGEST[kind], LARGEST[kind])
    made = stored(s, kind).astype(q.scales.dtype)
    if q.grid.read:
        return replace(q, scales=mx.where(mx.abs(before) < SMALLEST, q.scales, made))
    return replace(q, scales=mx.where(mx.abs(s) < MIN_SCALE, mx.where(s < 0, -MIN_SCALE, MIN_SCALE), made))


def slopes(q: QTensor[mx.array]) -> mx.array:
    """The values [rows, n] of `q` without its biases, in float32: how they grow with the factors of their scales."""
    biases = None if q.biases is None else mx.zeros_like(q.biases)
    return rounding.dequantize(replace(q, biases=biases, dtype="float32"))
