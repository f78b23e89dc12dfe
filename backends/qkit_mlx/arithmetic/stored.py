"""`qkit.reference.stored` in MLX, function by function, bit for bit: new codes on scales that are already there."""

from dataclasses import replace

import mlx.core as mx

from qkit.qtensor import QTensor, dtype_of
from qkit_mlx.arithmetic import rounding
from qkit_mlx.arithmetic.rounding import each


def requantize(w: mx.array, like: QTensor[mx.array]) -> QTensor[mx.array]:
    """The codes of finite `w` [..., n], whose shape is that of `like`, on the scales of `like`, in the type of `w`."""
    codes = _codes(_grouped(w, like), like)
    return replace(like, codes=codes.astype(like.codes.dtype).reshape(w.shape), dtype=dtype_of(w))


def fake_requantize(w: mx.array, like: QTensor[mx.array]) -> mx.array:
    """`dequantize(requantize(w, like))`, bit for bit. A NaN or an infinity makes itself NaN."""
    finite = mx.isfinite(w)
    values = rounding.dequantize(requantize(mx.where(finite, w, mx.zeros_like(w)), like))
    return mx.where(finite, values, mx.full(values.shape, mx.nan, values.dtype))


def unclipped(w: mx.array, like: QTensor[mx.array]) -> mx.array:
    """Where `w` [..., n] rounds to a code on the scales of `like` without being clipped."""
    x, element = _grouped(w, like), like.grid.element
    if element.kind == "float":
        inside = mx.abs(x) <= each(element.largest * mx.abs(_steps(like)))
    else:
        q, lowest = _quotient(x, like), element.lowest if like.grid.symmetric else 0
        inside = (q >= lowest) & (q <= lowest + element.levels)
    return inside.reshape(w.shape)


def _grouped(w: mx.array, like: QTensor[mx.array]) -> mx.array:
    return w.astype(mx.float32).reshape(like.grid.group_shape(tuple(w.shape)))


def _codes(x: mx.array, like: QTensor[mx.array]) -> mx.array:
    element, s = like.grid.element, _steps(like)
    if element.name == "e2m1":
        return rounding.e2m1_codes(x * each(mx.sign(s)), mx.abs(s))
    if element.kind == "float":
        return rounding.encode_float8(mx.clip(x / each(s), -element.largest, element.largest), element)
    lowest = element.lowest if like.grid.symmetric else 0
    return mx.clip(_quotient(x, like), lowest, lowest + element.levels)


def _quotient(x: mx.array, like: QTensor[mx.array]) -> mx.array:
    """The code of each value as a float, before it is clipped: fl(fl(x - bias) / s) to nearest even, plus the zero point."""
    if like.biases is not None:
        x = x - each(like.biases.astype(mx.float32))
    q = mx.round(x / each(_steps(like)))
    return q if like.zeros is None else q + each(like.zeros.astype(mx.float32))


def _steps(like: QTensor[mx.array]) -> mx.array:
    s = rounding.scale_values(like)
    return mx.where(s == 0, mx.inf, s)
