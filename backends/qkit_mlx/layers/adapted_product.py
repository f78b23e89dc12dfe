"""The product of a layer with an adapter, which stores nothing of the size of its weight for the backward pass.

The backward pass computes the merged weight and its values again, from the base and the factors, once its gradient is there.
Where the gradient passes straight through, it reaches the factors through products of their rank, as in mlx-lm.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx

from qkit.qtensor import DType, QTensor, dtype_of
from qkit.rules import Ste
from qkit_mlx.arithmetic import rounding
from qkit_mlx.arithmetic.gains import to_gains
from qkit_mlx.arithmetic.merged import added, merged, row_norms, shorten, through

LARGE: Final = 2**20  #: numbers in a weight that is computed in blocks
BLOCKS: Final = 16
ALL: Final = slice(None)


@dataclass(frozen=True, slots=True)
class Merging:
    """How a layer computes its values.

    Attributes:
        layer: the layer; its arrays `frozen` are those that the base is in.
        base: the base [outputs, inputs] from the arrays of the layer, whose first row has the number that is its argument; and
            from gains, if scales train while the product is beside it.
        scale: the factor of the product of a LoRA.
        dtype: of the merged weight.
        ste: of the grid; `identity` where the layer is off.
        by_rows: whether `on_grid` takes some of the rows, too.
        on_grid: the values of a merged weight, and of gains if scales train; the weight itself where the layer is off.
        unclipped: where a merged weight is not clipped, for `masked`.
        codes: those of a merged weight, before gains, for the gradient of these.
    """

    layer: Any
    frozen: Sequence[str]
    base: Callable[..., mx.array]
    scale: float
    dtype: DType
    ste: Ste
    by_rows: bool
    on_grid: Callable[..., mx.array]
    unclipped: Callable[[mx.array], mx.array]
    codes: Callable[[mx.array], QTensor[mx.array]] | None = None


def multiply(
    x: mx.array, factors: Sequence[mx.array], bias: mx.array | None, merging: Merging, *, gains: mx.array | None = None
) -> mx.array:
    """x [..., inputs] times the values, in the type of `x`, of the base merged with `factors` (A, B, magnitudes), plus `bias`.

    Args:
        gains: those of the scales and biases [outputs, groups or 1, numbers], if these train.
    """
    several, scaled = len(factors), [] if gains is None else [gains]
    trained = several + len(scaled)

    def forward(x: mx.array, *more: mx.array) -> mx.array:
        parts, bias = [mx.stop_gradient(one) for one in mx.depends(more[:trained], [x])], more[trained:]
        with _after(merging, [x]):
            values = _values(merging, parts[:several], parts[several:], dtype_of(x)).T
        return mx.addmm(bias[0], x, values) if bias else x @ values

    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, *more = primals
        parts = mx.depends(more[:trained], [cotangent])
        factors, gains = parts[:several], parts[several:]
        with _after(merging, [cotangent]):
            values = _values(merging, factors, gains, dtype_of(cotangent))
            base = merging.base(0, *gains)  # MLX computes it only where the gradient needs it
        to_x = (cotangent @ values).astype(x.dtype)
        rows, seen = cotangent.reshape(-1, cotangent.shape[-1]), x.reshape(-1, x.shape[-1])
        if merging.ste == "identity":
            a, b, *m = factors
            stretched, to_m = rows, []
            if m:
                with _after(merging, [to_x]):
                    stretch, gradient = _to_magnitudes(merging, mx.depends(factors, [to_x]), rows, seen)
                stretched, to_m = rows * stretch.astype(rows.dtype), [gradient]
            gradients = _by_rank(stretched, seen, a, b, merging.scale) + to_m
        else:
            to_v = (rows.T @ seen).astype(mx.float32)
            if merging.ste == "masked":
                to_v = rounding.masked(to_v, merging.unclipped(_merged(merging, base, factors)))
            gradients = through(to_v, base, *factors, scale=merging.scale)
        of_gains = []
        for one in gains:
            with _after(merging, [to_x]):
                of_gains.append(_to_gains(merging, mx.depends(factors, [to_x]), one, rows, seen))
        to_bias = [rows.sum(axis=0)] if len(more) > trained else []
        return (to_x, *gradients, *of_gains, *to_bias)

    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    answer: mx.array = function(x, *factors, *scaled, *([] if bias is None else [bias]))
    return answer


def _values(merging: Merging, factors: Sequence[mx.array], gains: Sequence[mx.array], dtype: DType) -> mx.array:
    """The values [outputs, inputs] in `dtype`."""

    def values(v: mx.array, _: slice, *scaled: mx.array) -> mx.array:
        return rounding.to_dtype(merging.on_grid(v, *scaled), dtype)

    return _by_blocks(merging, factors, gains, values)


def _to_gains(
    merging: Merging, factors: Sequence[mx.array], gains: mx.array, rows: mx.array, seen: mx.array
) -> mx.array:
    """The gradient of `gains`, from that of the output [n, outputs] and the input [n, inputs]."""

    def gradient(v: mx.array, some: slice, scaled: mx.array) -> mx.array:
        assert merging.codes is not None
        return to_gains(rows[:, some], seen, merging.codes(v), scaled).astype(gains.dtype)

    return _by_blocks(merging, factors, [gains], gradient)


def _to_magnitudes(
    merging: Merging, factors: Sequence[mx.array], rows: mx.array, seen: mx.array
) -> tuple[mx.array, mx.array]:
    """Of DoRA: the magnitudes over the lengths of rows [outputs], float32; and the gradient of the magnitudes.

    The lengths multiply rows of the weight, so that the gradients of A and B go through products of their rank.
    """

    def both(v: mx.array, some: slice) -> mx.array:
        norms = row_norms(v)
        moved = seen @ v.astype(seen.dtype).T
        total = (rows[:, some].astype(mx.float32) * moved.astype(mx.float32)).sum(axis=0)
        return mx.stack([magnitudes[some].astype(mx.float32) / norms, total / norms], axis=-1)

    a, b, magnitudes = factors
    blocks: list[mx.array] = []
    for some in _blocks(merging, b.shape[-1], a.shape[0]):
        with _after(merging, blocks[-1:], some):
            part = b[:, some].swapaxes(-1, -2)
            blocks.append(both(added(merging.base(some.start), part, a.swapaxes(-1, -2), merging.scale), some))
    stretch, gradient = mx.concatenate(blocks).T
    return stretch, gradient.astype(magnitudes.dtype)


def _by_blocks(
    merging: Merging, factors: Sequence[mx.array], gains: Sequence[mx.array], function: Callable[..., mx.array]
) -> mx.array:
    """`function` of the merged weight, the rows that it has, and their gains. Large ones are computed in blocks, one by one.

    So only one block's temporary arrays are in memory, among them the decoded base. MLX would otherwise compute all at once.
    """
    blocks: list[mx.array] = []
    a, b = factors[:2]
    for rows in _blocks(merging, b.shape[-1], a.shape[0]):
        with _after(merging, blocks[-1:], rows):
            waiting = mx.depends(list(factors), blocks[-1:]) if blocks else factors
            some, scaled = _of_rows(waiting, rows), [one[rows] for one in gains]
            v = _merged(merging, merging.base(rows.start, *scaled), some)
            blocks.append(function(v, rows, *scaled))
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks)


def _merged(merging: Merging, base: mx.array, factors: Sequence[mx.array]) -> mx.array:
    return merged(base, *factors, scale=merging.scale, dtype=merging.dtype)


def _of_rows(factors: Sequence[mx.array], rows: slice) -> list[mx.array]:
    """A, and the parts of B [rank, outputs] and of the magnitudes [outputs] that belong to `rows`."""
    a, b, *m = factors
    return [a, b[:, rows], *(one[rows] for one in m)]


def _blocks(merging: Merging, outputs: int, inputs: int) -> list[slice]:
    each = -(-outputs // BLOCKS) if merging.by_rows and outputs * inputs >= LARGE else outputs
    return [slice(first, first + each) for first in range(0, outputs, each)]


@contextmanager
def _after(merging: Merging, waited: Sequence[mx.array], rows: slice = ALL) -> Iterator[None]:
    """Has `rows` of the layer's base wait for `waited`, so that nothing decodes them before, and no compiler shares them."""
    layer = merging.layer
    before = {name: layer[name] for name in merging.frozen if name in layer}
    parts = [array[rows] if array.ndim else array for array in before.values()]
    for name, array in zip(before, mx.depends(parts, list(waited)) if waited else parts, strict=True):
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
