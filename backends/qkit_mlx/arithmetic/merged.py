"""`qkit/reference/merged.py` in MLX: the merged weight of a layer and its adapter, and the gradient. Arrays only."""

from functools import cache
from typing import Any

import mlx.core as mx

from qkit.element import MIN_SCALE, Element
from qkit.qtensor import DType, QTensor
from qkit.reference import merged as law
from qkit.reference.merged import DITHER, DROPPED
from qkit_mlx.arithmetic import rounding
from qkit_mlx.arithmetic.scale_rules import bits


def merged(w: mx.array, a: mx.array, b: mx.array, m: mx.array | None = None, *, scale: float, dtype: DType) -> mx.array:
    """The merged weight [..., outputs, inputs] of base `w`, in `dtype`. Gradients pass unchanged through shortening and rounding.

    Args:
        a: [..., inputs, rank], as in mlx-lm.
        b: [..., rank, outputs], as in mlx-lm.
        m: the magnitudes [..., outputs] of DoRA.
    """

    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        w, *factors = primals
        to_v = cotangent.astype(mx.float32)
        return to_w(to_v, w, *factors, scale=scale).astype(w.dtype), *through(to_v, w, *factors, scale=scale)

    def forward(*primals: mx.array) -> mx.array:
        # MLX also asks for the jvp of the operations inside, and operations on bit patterns have none.
        w, a, b, *rest = map(mx.stop_gradient, primals)
        v = added(w, _turned(b), _turned(a), scale)
        return stored(v if not rest else v * (rest[0].astype(mx.float32) / row_norms(v))[..., None], dtype)

    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    return function(w, a, b, *([] if m is None else [m]))  # type: ignore[no-any-return]


def through(
    to_v: mx.array, w: mx.array, a: mx.array, b: mx.array, m: mx.array | None = None, *, scale: float
) -> list[mx.array]:
    """The gradients of A, B and the magnitudes from that of the merged weight, float32 [..., outputs, inputs]."""
    to_m = []
    if m is not None:
        v = added(w, _turned(b), _turned(a), scale)
        norms = row_norms(v)
        to_m = [((to_v * v).sum(axis=-1) / norms).astype(m.dtype)]
        to_v = to_v * (m.astype(mx.float32) / norms)[..., None]
    to_b = scale * (to_v @ shorten(a.astype(mx.float32)))
    to_a = shorten(b.astype(mx.float32) * scale) @ to_v
    return [_turned(to_a).astype(a.dtype), _turned(to_b).astype(b.dtype), *to_m]


def to_w(to_v: mx.array, w: mx.array, a: mx.array, b: mx.array, m: mx.array | None = None, *, scale: float) -> mx.array:
    """The gradient of the base, float32, from that of the merged weight."""
    if m is None:
        return to_v
    return to_v * (m.astype(mx.float32) / row_norms(added(w, _turned(b), _turned(a), scale)))[..., None]


def added(w: mx.array, b: mx.array, a: mx.array, scale: float) -> mx.array:
    """V = W + scale * B A, in float32; B [outputs, rank], A [rank, inputs]."""
    return w.astype(mx.float32) + product(shorten(b.astype(mx.float32) * scale), shorten(a.astype(mx.float32)))


def dithered(q: QTensor[mx.array], *, first: int = 0) -> mx.array:
    """The values [outputs, inputs] of `q`, float32, each moved within its cell. Its first row has the number `first`."""
    codes = q.codes.reshape(q.grid.group_shape(q.shape))
    d = dither(q.codes, first=first).reshape(codes.shape)
    if q.grid.element.kind == "float":
        v, moved = _moved_floats(codes, d, q.grid.element)
    else:
        v = codes.astype(mx.float32)
        v = v if q.zeros is None else v - rounding.each(q.zeros.astype(mx.float32))
        moved = v + d
    if not q.grid.read:
        moved = mx.where(_outermost(v, symmetric=q.grid.symmetric), v, moved)
    values = moved * rounding.each(rounding.scale_values(q))
    if q.biases is not None:
        values = values + rounding.each(q.biases.astype(mx.float32))
    return values.reshape(q.shape)


def dither(codes: mx.array, *, first: int = 0) -> mx.array:
    """Multiples of 2^-9 between -1/2 and 1/2, exclusive, for `codes` [outputs, inputs] from row `first` on.

    They wait for the codes: a compiler would otherwise compute them once for all uses in a step, and keep them until the last.
    """
    rows, columns = (
        mx.depends([mx.arange(begin, begin + n, dtype=mx.uint32)], [codes])[0] * mx.array(step, mx.uint32)
        for begin, n, step in zip((first, 0), codes.shape, DITHER, strict=True)
    )
    levels = (rows[:, None] + columns) >> 24
    found: mx.array = (levels.astype(mx.float32) * 2 - 255) * 2.0**-9
    return found


def _outermost(v: mx.array, *, symmetric: bool) -> mx.array:
    if symmetric:
        return mx.abs(v) == mx.abs(v).max(axis=-1, keepdims=True)
    return (v == v.max(axis=-1, keepdims=True)) | (v == v.min(axis=-1, keepdims=True))


def _moved_floats(codes: mx.array, d: mx.array, element: Element) -> tuple[mx.array, mx.array]:
    table = _magnitudes(element)
    wide = codes.astype(mx.int32)
    code, last = wide & (1 << (element.bits - 1)) - 1, len(table) - 1
    sign = mx.where((wide >> (element.bits - 1) & 1) != 0, mx.array(-1.0), mx.array(1.0))
    size, along = table[code], d * sign
    up, down = table[mx.minimum(code + 1, last)] - size, size - table[mx.maximum(code, 1) - 1]
    gap = mx.where(((along > 0) & (code < last)) | (code == 0), up, down)
    return sign * size, sign * (size + along * gap)


@cache
def _magnitudes(element: Element) -> mx.array:
    return mx.array(law.magnitudes(element))


def product(b: mx.array, a: mx.array) -> mx.array:
    """B A of shortened factors [..., outputs, rank] and [..., rank, inputs], summed from the first column of B to the last."""
    total = b[..., :1] * a[..., :1, :]
    for k in range(1, a.shape[-2]):
        total = total + b[..., k : k + 1] * a[..., k : k + 1, :]
    return total


def row_norms(v: mx.array) -> mx.array:
    """Lengths [..., outputs] of the rows of `v`, shortened; at least 2^-96."""
    squares = shorten(v).square()
    n = 1 << (v.shape[-1] - 1).bit_length()
    squares = mx.pad(squares, [(0, 0)] * (v.ndim - 1) + [(0, n - v.shape[-1])])
    while n > 1:
        n //= 2
        squares = squares[..., :n] + squares[..., n:]
    return mx.maximum(mx.sqrt(squares[..., 0]), MIN_SCALE)


def shorten(x: mx.array) -> mx.array:
    """`x` with 12 significant bits, ties to even."""
    return _significant(x, DROPPED)


def stored(x: mx.array, dtype: DType) -> mx.array:
    """float32 `x` rounded to `dtype`. The rounding is in integers, since compilers delete a cast down and up again."""
    if dtype == "bfloat16":
        x = _significant(x, 16)
    elif dtype == "float16":
        x = mx.where(mx.abs(x) < 2.0**-14, mx.round(x * 2.0**24) * 2.0**-24, _significant(x, 13))
    return rounding.to_dtype(x, dtype)


def _turned(x: mx.array) -> mx.array:
    return x.swapaxes(-1, -2)


def _significant(x: mx.array, dropped: int) -> mx.array:
    u = bits(x)
    return ((u + ((1 << dropped - 1) - 1) + ((u >> dropped) & 1)) & ~((1 << dropped) - 1)).view(mx.float32)
