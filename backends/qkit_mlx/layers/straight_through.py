"""The straight-through estimator (R12): values on a grid, with gradients as if they had not been rounded."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx


def straight_through(
    x: mx.array, values: Callable[[mx.array], mx.array], *, where: Callable[[mx.array], mx.array] | None = None
) -> mx.array:
    """`values(x)`, whose gradient with respect to `x` is the identity, or zero where `where(x)` is false."""
    if where is None:
        return _second(x, values(mx.stop_gradient(x)))  # type: ignore[no-any-return]

    def slope(x: mx.array, cotangent: mx.array, *_: mx.array) -> mx.array:
        return mx.where(where(x), cotangent, 0)

    # MLX asks for the jvp of what is inside too, and bit patterns and kernels have none
    function: Any = mx.custom_function(lambda x: values(mx.stop_gradient(x)))
    function.vjp(slope)
    function.jvp(slope)
    return function(x)  # type: ignore[no-any-return]


def _make_second() -> Any:
    """A function of two arrays that gives the second, with the gradient of the first. One for all: to make one takes a while."""
    function: Any = mx.custom_function(lambda _, values: values)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        return cotangent, mx.zeros_like(cotangent)

    @function.jvp  # type: ignore[untyped-decorator]
    def forward(_: Any, tangents: tuple[mx.array, None]) -> mx.array:
        return tangents[0]

    return function


_second = _make_second()
