"""`qkit.reference.gains` in MLX, bit for bit: scales and biases of codes, moved by numbers that train."""

from dataclasses import replace

import mlx.core as mx

from qkit.element import MIN_SCALE
from qkit.qtensor import QTensor
from qkit.reference.gains import FARTHEST, LARGEST, LIMITS, SHIFT, SMALLEST, UNIT, stored_type
from qkit_mlx.arithmetic import rounding
from qkit_mlx.arithmetic.merged import shorten, stored
from qkit_mlx.arithmetic.stored import quotient, requantize


def new_codes(w: mx.array, like: QTensor[mx.array]) -> QTensor[mx.array]:
    """The codes of finite `w` [rows, n] on the read grid of `like`, before gains. Where there are biases, on `widened` scales."""
    return requantize(w, like if like.biases is None else widened(w, like))


def widened(w: mx.array, like: QTensor[mx.array]) -> QTensor[mx.array]:
    """`like`, of integers with biases, with the scale and the bias of each group whose values in `w` would be clipped."""
    levels, u = like.grid.element.levels, quotient(w, like)
    low = mx.maximum(mx.minimum(u.min(axis=-1) + 0.5, 0.0), -FARTHEST)
    high = mx.minimum(mx.maximum(u.max(axis=-1) - 0.5, float(levels)), levels + FARTHEST)
    span = high - low
    return _scaled(like, mx.where(span == levels, mx.array(1.0), span * (1 / levels)), low)


def gained(q: QTensor[mx.array], gains: mx.array) -> QTensor[mx.array]:
    """`q` [rows, n] with scales multiplied by 1 + UNIT * their gain, and biases moved, both rounded to their type.

    Args:
        gains: [rows, groups or 1, numbers].
    """
    factors = mx.clip(1 + UNIT * gains[..., 0].astype(mx.float32), *LIMITS)
    if q.grid.read:
        return _scaled(q, factors, SHIFT * gains[..., 1].astype(mx.float32) if gains.shape[-1] == 2 else None)
    s = _limited(q.scales.astype(mx.float32) * factors, q)
    made = stored(s, stored_type(q)).astype(q.scales.dtype)
    return replace(q, scales=mx.where(mx.abs(s) < MIN_SCALE, mx.where(s < 0, -MIN_SCALE, MIN_SCALE), made))


def _scaled(q: QTensor[mx.array], factors: mx.array, shift: mx.array | None) -> QTensor[mx.array]:
    kind, before, biases = stored_type(q), q.scales.astype(mx.float32), q.biases
    s = stored(_limited(before * factors, q), kind).astype(q.scales.dtype)
    scales = mx.where(mx.abs(before) < SMALLEST, q.scales, s)
    if biases is not None and shift is not None:
        by = shorten(before) * shorten(mx.clip(shift, -FARTHEST, FARTHEST))
        b = _flushed(_limited(_flushed(biases.astype(mx.float32)) + by, q))
        biases = mx.where(mx.abs(by) < SMALLEST, biases, stored(b, kind).astype(biases.dtype))
    return replace(q, scales=scales, biases=biases)


def _limited(x: mx.array, q: QTensor[mx.array]) -> mx.array:
    return mx.clip(x, -LARGEST[stored_type(q)], LARGEST[stored_type(q)])


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
