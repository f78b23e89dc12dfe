"""`qkit/reference/merged.py` in MLX: the merged weight of a layer and its adapter, and the gradient. Arrays only."""

from typing import Any

import mlx.core as mx

from qkit.element import MIN_SCALE
from qkit.qtensor import DType
from qkit.reference.merged import DROPPED
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
