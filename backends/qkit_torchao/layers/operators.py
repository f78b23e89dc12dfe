"""Operations that compiled code calls, a node each: products with the values of a weight, and quantizing an input.

A compiler does not look inside, so that the cache of values is asked whenever they run. An input that several layers quantize is
one node for all of them. Where the values have a buffer, a node fills it, and the compiler makes the product with it. Else
backward needs the input and the weight only, so that a weight gathered for a moment leaves nothing of its size behind.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.grid import Grid
from qkit.rules import Ste
from qkit_torchao.cache import values
from qkit_torchao.kernels import choose
from qkit_torchao.layers.straight_through import peak_of, through


def multiply_values(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    grid: Grid,
    name: str,
    ste: Ste,
    dtype: torch.dtype,
    *,
    cached: bool,
    buffer: Tensor | None = None,
    partners: list[Tensor],
) -> Tensor:
    """x [..., inputs] times the values of `weight` [outputs, inputs] in `dtype`, straight through, plus `bias`.

    Args:
        name: `grid` as text, since operations take text and a compiler cannot print.
        cached: whether the values are cached until the weight changes, or computed by every forward and backward.
        buffer: the memory of the cached values, see `values.buffer`, if that is of type `dtype`. The compiler then sees the
            product, and fuses additions with it.
        partners: the other weights that share the tensor scale.
    """
    narrow = bias if bias is None else bias.to(dtype)
    if buffer is None or buffer.dtype != dtype or not cached:
        whole: Tensor = torch.ops.qkit.linear(x.to(dtype), weight, narrow, gate, name, ste, dtype, cached, partners)
        return whole
    with torch.no_grad():
        torch.ops.qkit.fill(buffer, weight, gate, name, partners)
    y: Tensor = _Product.apply(x.to(dtype), weight, narrow, gate, buffer, grid, ste, *partners)  # type: ignore[no-untyped-call]
    return y


def _fill(buffer: Tensor, weight: Tensor, gate: Tensor, grid: str, partners: list[Tensor]) -> None:
    values.fill(buffer, weight, named(grid), gate, tuple(partners))


_library = torch.library.Library("qkit", "FRAGMENT")  # a `custom_op` takes 8 times as long to call, as every layer does
_library.define("fill(Tensor(a!) buffer, Tensor weight, Tensor gate, str grid, Tensor[] partners) -> ()")
_library.impl("fill", _fill, "CompositeExplicitAutograd")
torch.library.register_fake("qkit::fill", lambda *_: None, lib=_library)


class _Product(torch.autograd.Function):
    """The product with the values in the buffer; going back, they stand for the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor,
        buffer: Tensor,
        grid: Grid,
        ste: str,
        *partners: Tensor,
    ) -> Tensor:
        ctx.grid, ctx.ste, ctx.biased = grid, ste, bias is not None
        ctx.save_for_backward(x, weight, gate, buffer, *partners)
        return F.linear(x, buffer, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, buffer, *partners = ctx.saved_tensors
        to_x = gradients[0] @ buffer if ctx.needs_input_grad[0] else None
        nothing = [None] * (4 + len(partners))
        return to_x, *_to_parameters(ctx, gradients[0], x, weight, gate, ctx.grid, partners), *nothing


@torch.library.custom_op("qkit::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    grid: str,
    ste: str,
    dtype: torch.dtype,
    cached: bool,
    partners: Sequence[Tensor],
) -> Tensor:
    compute = values.of if cached else values.fresh
    return F.linear(x, compute(weight, named(grid), gate, dtype, tuple(partners)), bias)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("qkit::linear_input", mutates_args=())
def _linear_input(
    gradient: Tensor,
    weight: Tensor,
    gate: Tensor,
    grid: str,
    dtype: torch.dtype,
    cached: bool,
    partners: Sequence[Tensor],
) -> Tensor:
    compute = values.of if cached else values.fresh
    return gradient @ compute(weight, named(grid), gate, dtype, tuple(partners))


@_linear_input.register_fake
def _(gradient: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], weight.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, gate, ctx.grid, ctx.ste, ctx.dtype, ctx.cached, partners = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, weight, gate, *partners)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, weight, gate, *partners = ctx.saved_tensors
    to_x = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.qkit.linear_input(gradient, weight, gate, ctx.grid, ctx.dtype, ctx.cached, partners)
    to_parameters = _to_parameters(ctx, gradient, x, weight, gate, named(ctx.grid), partners)
    return to_x, *to_parameters, None, None, None, None, None, [None] * len(partners)


def _to_parameters(
    ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, gate: Tensor, grid: Grid, partners: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias."""
    to_weight = to_bias = None
    rows = gradient.reshape(-1, gradient.shape[-1])
    if ctx.needs_input_grad[1]:
        to_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.ste == "masked":
            to_weight = through(to_weight, weight, grid, gate=gate, peak=peak_of(weight, partners))
    if ctx.biased and ctx.needs_input_grad[2]:
        to_bias = rows.sum(dim=0)
    return to_weight, to_bias


_linear.register_autograd(_backward, setup_context=_setup)


def frozen_values(
    weight: Tensor, gate: Tensor, grid: str, ste: Ste, dtype: torch.dtype, partners: list[Tensor]
) -> Tensor:
    """A copy of the frozen values of `weight` [entries, width], straight through; the values themselves change in place."""
    copy: Tensor = torch.ops.qkit.frozen_values(weight, gate, grid, ste, dtype, partners)
    return copy


@torch.library.custom_op("qkit::frozen_values", mutates_args=())
def _frozen_values(
    weight: Tensor, gate: Tensor, grid: str, ste: str, dtype: torch.dtype, partners: Sequence[Tensor]
) -> Tensor:
    return values.of(weight, named(grid), gate, dtype, tuple(partners)).clone()


@_frozen_values.register_fake
def _(weight: Tensor, gate: Tensor, grid: str, ste: str, dtype: torch.dtype, *_: Any) -> Tensor:
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


def _setup_frozen(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, gate, ctx.grid, ctx.ste, _, partners = inputs
    ctx.save_for_backward(weight, gate, *partners)


def _frozen_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    weight, gate, *partners = ctx.saved_tensors
    to_weight = gradient.to(weight.dtype)
    if ctx.ste == "masked":
        to_weight = through(to_weight, weight, named(ctx.grid), gate=gate, peak=peak_of(weight, partners))
    return to_weight, None, None, None, None, [None] * len(partners)


_frozen_values.register_autograd(_frozen_backward, setup_context=_setup_frozen)


def on_grid(x: Tensor, gate: Tensor, grid: str, ste: Ste) -> Tensor:
    """`x` on the grid that prints as `grid`, straight through; `x` itself where `gate` is off."""
    y: Tensor = torch.ops.qkit.on_grid(x, gate, grid, ste)
    return y


@torch.library.custom_op("qkit::on_grid", mutates_args=())
def _on_grid(x: Tensor, gate: Tensor, grid: str, ste: str) -> Tensor:
    return choose.gated(x.contiguous(), named(grid), gate)


@_on_grid.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _on_grid_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, ctx.grid, ctx.ste = inputs
    ctx.save_for_backward(*([x, gate] if ctx.ste == "masked" else []))


def _on_grid_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.ste == "masked":
        x, gate = ctx.saved_tensors
        gradient = through(gradient, x, named(ctx.grid), gate=gate)
    return gradient, None, None, None


_on_grid.register_autograd(_on_grid_backward, setup_context=_on_grid_setup)


@cache
def named(text: str) -> Grid:
    """The grid that prints as `text`."""
    return Grid.parse(text)
