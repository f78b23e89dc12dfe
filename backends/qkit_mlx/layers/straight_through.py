"""The straight-through estimator (R12): values on a grid, with the gradient of the array that was rounded."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.rules import Ste
from qkit_mlx.arithmetic import rounding, stored
from qkit_mlx.kernels import choose


def fake_quantize(
    w: mx.array,
    grid: Grid,
    *,
    ste: Ste = "identity",
    scales: mx.array | None = None,
    zeros: mx.array | None = None,
    peak: mx.array | None = None,
) -> mx.array:
    """The values [..., n] that `w` would have after `dequantize(quantize(w, grid))`, bit for bit, in the type of `w`.

    The gradient of `w` is the identity, or, if `ste` is "masked", zero where a value was clipped. `scales`, `zeros` and `peak`:
    see `rounding.fake_quantize`.
    """
    if not w.size:  # a layer that no token reaches
        return w
    unclipped = partial(rounding.unclipped, grid=grid, scales=scales, zeros=zeros, peak=peak)
    if scales is None:
        return _pass_through(w, partial(choose.fake_quantize, grid=grid, peak=peak), unclipped, ste)
    return _pass_through(w, partial(rounding.fake_quantize, grid=grid, scales=scales, zeros=zeros), unclipped, ste)


def fake_requantize(w: mx.array, like: QTensor[mx.array], *, ste: Ste) -> mx.array:
    """`stored.fake_requantize(w, like)`, with the gradient of `fake_quantize`."""
    return _pass_through(w, partial(stored.fake_requantize, like=like), partial(stored.unclipped, like=like), ste)


def values_view(weight: mx.array, values: mx.array, grid: Grid, *, ste: Ste, peak: mx.array | None = None) -> mx.array:
    """`values`, the quantized values of `weight`, with the gradient of `fake_quantize`."""
    return _pass_through(weight, lambda _: values, partial(choose.unclipped_weight, grid=grid, peak=peak), ste)


def _pass_through(
    x: mx.array, rounded: Callable[[mx.array], mx.array], unclipped: Callable[[mx.array], mx.array], ste: Ste
) -> mx.array:
    """`rounded(x)`, with the straight-through gradient of `x`."""
    if ste == "identity":
        return _second(x, rounded(mx.stop_gradient(x)))  # type: ignore[no-any-return]

    def slope(x: mx.array, cotangent: mx.array, *_: mx.array) -> mx.array:
        return rounding.masked(cotangent, unclipped(x))

    # MLX also asks for the jvp of the operations inside; bit patterns and kernels have none.
    function: Any = mx.custom_function(lambda x: rounded(mx.stop_gradient(x)))
    function.vjp(slope)
    function.jvp(slope)
    return function(x)  # type: ignore[no-any-return]


def _make_second() -> Any:
    """A function of two arrays that returns the second, with the gradient of the first."""
    function: Any = mx.custom_function(lambda _, values: values)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        return cotangent, mx.zeros_like(cotangent)

    @function.jvp  # type: ignore[untyped-decorator]
    def forward(_: Any, tangents: tuple[mx.array, None]) -> mx.array:
        return tangents[0]

    return function


_second = _make_second()  # one for all calls, since making a custom function takes time
