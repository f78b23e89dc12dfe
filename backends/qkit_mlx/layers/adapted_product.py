"""The product of a layer with an adapter, which stores nothing of the size of its weight for the backward pass.

The backward pass computes the merged weight and its values again, from the base and the factors, once its gradient is there.
Where the gradient passes straight through to a LoRA, it reaches the factors through products of their rank, as in mlx-lm.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qkit.qtensor import DType, dtype_of
from qkit.rules import Ste
from qkit_mlx.arithmetic import rounding
from qkit_mlx.arithmetic.merged import merged, shorten, through


@dataclass(frozen=True, slots=True)
class Merging:
    """How a layer computes its values.

    Attributes:
        layer: the layer; its arrays `frozen` are those that the base is in.
        base: the base [outputs, inputs] from the arrays of the layer.
        scale: the factor of the product of a LoRA.
        dtype: of the merged weight.
        ste: of the grid; `identity` where the layer is off.
        on_grid: the values of a merged weight; the weight itself where the layer is off.
        unclipped: where a merged weight is not clipped, for `masked`.
    """

    layer: Any
    frozen: Sequence[str]
    base: Callable[[], mx.array]
    scale: float
    dtype: DType
    ste: Ste
    on_grid: Callable[[mx.array], mx.array]
    unclipped: Callable[[mx.array], mx.array]


def multiply(x: mx.array, factors: Sequence[mx.array], bias: mx.array | None, merging: Merging) -> mx.array:
    """x [..., inputs] times the values, in the type of `x`, of the base merged with `factors` (A, B, magnitudes), plus `bias`."""
    several = len(factors)

    def forward(x: mx.array, *more: mx.array) -> mx.array:
        factors, bias = [mx.stop_gradient(one) for one in more[:several]], more[several:]
        values = rounding.to_dtype(_values(merging, factors), dtype_of(x)).T
        return mx.addmm(bias[0], x, values) if bias else x @ values

    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, *more = primals
        factors = mx.depends(more[:several], [cotangent])
        with _after(merging, cotangent):
            base = merging.base()
            v = merged(base, *factors, scale=merging.scale, dtype=merging.dtype)
            values = rounding.to_dtype(merging.on_grid(v), dtype_of(cotangent))
        to_x = (cotangent @ values).astype(x.dtype)
        rows, seen = cotangent.reshape(-1, cotangent.shape[-1]), x.reshape(-1, x.shape[-1])
        if several == 2 and merging.ste == "identity":
            a, b = factors
            gradients = _by_rank(rows, seen, a, b, merging.scale)
        else:
            to_v = (rows.T @ seen).astype(mx.float32)
            if merging.ste == "masked":
                to_v = rounding.masked(to_v, merging.unclipped(v))
            gradients = through(to_v, base, *factors, scale=merging.scale)
        to_bias = [rows.sum(axis=0)] if len(more) > several else []
        return (to_x, *gradients, *to_bias)

    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    answer: mx.array = function(x, *factors, *([] if bias is None else [bias]))
    return answer


def _values(merging: Merging, factors: Sequence[mx.array]) -> mx.array:
    return merging.on_grid(merged(merging.base(), *factors, scale=merging.scale, dtype=merging.dtype))


@contextmanager
def _after(merging: Merging, gradient: mx.array) -> Iterator[None]:
    """Has the layer's base wait for `gradient`, so that nothing decodes it before, and no compiler takes it for the forward's."""
    layer = merging.layer
    before = {name: layer[name] for name in merging.frozen if name in layer}
    for name, array in zip(before, mx.depends(list(before.values()), [gradient]), strict=True):
        layer[name] = array
    try:
        yield
    finally:
        for name, array in before.items():
            layer[name] = array


def _by_rank(rows: mx.array, seen: mx.array, a: mx.array, b: mx.array, scale: float) -> list[mx.array]:
    """The gradients of A [inputs, rank] and B [rank, outputs], from that of the output [n, outputs] and the input [n, inputs]."""
    short_a = rounding.to_dtype(shorten(a.astype(mx.float32)), dtype_of(rows))
    short_b = rounding.to_dtype(shorten(b.astype(mx.float32) * scale), dtype_of(rows))
    to_a = seen.T @ (rows @ short_b.T)
    to_b = scale * ((seen @ short_a).T @ rows)
    return [to_a.astype(a.dtype), to_b.astype(b.dtype)]
