"""`qkit.reference.gains` in MLX, bit for bit: scales and biases of codes, moved by numbers that train."""

from dataclasses import replace

import mlx.core as mx

from qkit.element import MIN_SCALE
from qkit.qtensor import QTensor
from qkit.reference.gains import FARTHEST, LARGEST, LIMITS, NARROW, SHIFT, SMALLEST, UNIT, stored_type
from qkit_mlx.arithmetic import rounding
from qkit_mlx.arithmetic.merged import shorten, stored


def gained(q: QTensor[mx.array], gains: mx.array) -> QTensor[mx.array]:
    """`q` [rows, n] with scales multiplied by 1 + UNIT * their gain, and biases moved, both rounded to their type.

    Args:
        gains: [rows, groups or 1, numbers].
    """
    kind, before = stored_type(q), q.scales.astype(mx.float32)
    factors = mx.clip(1 + UNIT * gains[..., 0].astype(mx.float32), *(NARROW if q.grid.read else LIMITS))
    s = mx.clip(before * factors, -LARGEST[kind], LARGEST[kind])
    made = stored(s, kind).astype(q.scales.dtype)
    if q.grid.read:
        scales = mx.where(mx.abs(before) < SMALLEST, q.scales, made)
        return replace(q, scales=scales, biases=_moved(q, gains))
    return replace(q, scales=mx.where(mx.abs(s) < MIN_SCALE, mx.where(s < 0, -MIN_SCALE, MIN_SCALE), made))


def _moved(q: QTensor[mx.array], gains: mx.array) -> mx.array | None:
    if q.biases is None or gains.shape[-1] == 1:
        return q.biases
    kind = stored_type(q)
    shift = mx.clip(SHIFT * gains[..., 1].astype(mx.float32), -FARTHEST, FARTHEST)
    by = shorten(q.scales.astype(mx.float32)) * shorten(shift)
    b = mx.clip(_flushed(q.biases.astype(mx.float32)) + by, -LARGEST[kind], LARGEST[kind])
    return mx.where(mx.abs(by) < SMALLEST, q.biases, stored(_flushed(b), kind).astype(q.biases.dtype))


def _flushed(x: mx.array) -> mx.array:
    return mx.where(mx.abs(x) < SMALLEST, mx.array(0.0), x)


def slopes(q: QTensor[mx.array]) -> mx.array:
    """The values [rows, n] of `q` without its biases, in float32: how they grow with the factors of their scales."""
    biases = None if q.biases is None else mx.zeros_like(q.biases)
    return rounding.dequantize(replace(q, biases=biases, dtype="float32"))


def to_gains(rows: mx.array, seen: mx.array, q: QTensor[mx.array], gains: mx.array) -> mx.array:
    """The gradient of `gains`, from that of outputs [n, rows] and from inputs [n, inputs]; `q` has the codes, without gains."""
    if gains.shape[1] == 1 == gains.shape[2]:  # one for each row, so that no gradient of a whole weight is needed
        moved = seen @ slopes(q).astype(seen.dtype).T
        return (UNIT * (rows.astype(mx.float32) * moved.astype(mx.float32)).sum(axis=0))[:, None, None]
    return of_values((rows.T @ seen).astype(mx.float32), q, gains)


def of_values(to_values: mx.array, q: QTensor[mx.array], gains: mx.array) -> mx.array:
    """The gradient of `gains`, from that of the values [rows, n]; `q` has the codes, without gains."""
    to_scales = UNIT * (to_values * slopes(q)).reshape(*gains.shape[:2], -1).sum(axis=-1)
    if gains.shape[2] == 1:
        return to_scales[..., None]
    to_biases = SHIFT * q.scales.astype(mx.float32) * to_values.reshape(*gains.shape[:2], -1).sum(axis=-1)
    return mx.stack([to_scales, to_biases], axis=-1)
