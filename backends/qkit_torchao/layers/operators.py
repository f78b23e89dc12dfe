"""Operations that compiled code calls, a node each: products with the values of a weight, and quantizing an input.

A compiler does not look inside. `values` is asked when they run, which knows whether the weight has changed; and an input that
several layers quantize is one node for all of them. Where the values have a room of their own, the node fills it, and the product
with it is the compiler's. Else backward needs the input and the weight only, so that a weight which is gathered for a moment
leaves nothing of its size behind.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.grid import Grid
from qkit.rules import Ste
from qkit_torchao.arithmetic import rounding
from qkit_torchao.cache import values
from qkit_torchao.kernels import choose


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    grid: Grid,
    name: str,
    ste: Ste,
    dtype: torch.dtype,
    *,
    kept: bool,
    room: Tensor | None = None,
) -> Tensor:
    """x [..., inputs] times the values of `weight` [outputs, inputs] in `dtype`, straight through, plus `bias`.

    Args:
        name: `grid` as text: operations are given it, and a compiler cannot print.
        kept: whether the values are kept until the weight changes, or made by every forward and backward.
        room: where they are kept, see `values.room`, if that is of type `dtype`. The compiler then sees products with it, and
            adds to them or adds them up in one kernel.
    """
    narrow = bias if bias is None else bias.to(dtype)
    if room is None or room.dtype != dtype or not kept:
        made: Tensor = torch.ops.qkit.linear(x.to(dtype), weight, narrow, gate, name, ste, dtype, kept)
        return made
    with torch.no_grad():
        torch.ops.qkit.fill(room, weight, gate, name)
    y: Tensor = _Product.apply(x.to(dtype), weight, narrow, gate, room, grid, ste)  # type: ignore[no-untyped-call]
    return y


def _fill(room: Tensor, weight: Tensor, gate: Tensor, grid: str) -> None:
    values.fill(room, weight, named(grid), gate)


_library = torch.library.Library("qkit", "FRAGMENT")  # a `custom_op` takes 8 times as long to call, as every layer does
_library.define("fill(Tensor(a!) room, Tensor weight, Tensor gate, str grid) -> ()")
_library.impl("fill", _fill, "CompositeExplicitAutograd")
torch.library.register_fake("qkit::fill", lambda *_: None, lib=_library)


class _Product(torch.autograd.Function):
    """The product with what is in the room, which going back is the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, room: Tensor, grid: Grid, ste: str
    ) -> Tensor:
        ctx.grid, ctx.ste, ctx.biased = grid, ste, bias is not None
        ctx.save_for_backward(x, weight, gate, room)
        return F.linear(x, room, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, room = ctx.saved_tensors
        to_x = gradients[0] @ room if ctx.needs_input_grad[0] else None
        return to_x, *_to_parameters(ctx, gradients[0], x, weight, gate, ctx.grid), None, None, None, None


@torch.library.custom_op("qkit::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    grid: str,
    ste: str,
    dtype: torch.dtype,
    kept: bool,
) -> Tensor:
    make = values.of if kept else values.fresh
    return F.linear(x, make(weight, named(grid), gate, dtype), bias)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("qkit::linear_input", mutates_args=())
def _linear_input(gradient: Tensor, weight: Tensor, gate: Tensor, grid: str, dtype: torch.dtype, kept: bool) -> Tensor:
    make = values.of if kept else values.fresh
    return gradient @ make(weight, named(grid), gate, dtype)


@_linear_input.register_fake
def _(gradient: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], weight.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, gate, ctx.grid, ctx.ste, ctx.dtype, ctx.kept = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, weight, gate)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gate = ctx.saved_tensors
    to_x = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.qkit.linear_input(gradient, weight, gate, ctx.grid, ctx.dtype, ctx.kept)
    return to_x, *_to_parameters(ctx, gradient, x, weight, gate, named(ctx.grid)), None, None, None, None, None


def _to_parameters(
    ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, gate: Tensor, grid: Grid
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias."""
    to_weight = to_bias = None
    rows = gradient.reshape(-1, gradient.shape[-1])
    if ctx.needs_input_grad[1]:
        to_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.ste == "masked":
            to_weight = torch.where(rounding.unclipped(weight, grid) | ~gate, to_weight, 0.0)
    if ctx.biased and ctx.needs_input_grad[2]:
        to_bias = rows.sum(dim=0)
    return to_weight, to_bias


_linear.register_autograd(_backward, setup_context=_setup)


def held(weight: Tensor, gate: Tensor, grid: str, ste: Ste, dtype: torch.dtype) -> Tensor:
    """The values of `weight` [entries, width] that are held, straight through; a copy, since those change in place."""
    made: Tensor = torch.ops.qkit.held(weight, gate, grid, ste, dtype)
    return made


@torch.library.custom_op("qkit::held", mutates_args=())
def _held(weight: Tensor, gate: Tensor, grid: str, ste: str, dtype: torch.dtype) -> Tensor:
    return values.of(weight, named(grid), gate, dtype).clone()


@_held.register_fake
def _(weight: Tensor, gate: Tensor, grid: str, ste: str, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


def _setup_held(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, gate, ctx.grid, ctx.ste, _ = inputs
    ctx.save_for_backward(weight, gate)


def _held_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight, gate = ctx.saved_tensors
    to_weight = gradient.to(weight.dtype)
    if ctx.ste == "masked":
        to_weight = torch.where(rounding.unclipped(weight, named(ctx.grid)) | ~gate, to_weight, 0.0)
    return to_weight, None, None, None, None


_held.register_autograd(_held_backward, setup_context=_setup_held)


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
        gradient = torch.where(rounding.unclipped(x, named(ctx.grid)) | ~gate, gradient, 0.0)
    return gradient, None, None, None


_on_grid.register_autograd(_on_grid_backward, setup_context=_on_grid_setup)


@cache
def named(text: str) -> Grid:
    """The grid that prints as `text`."""
    return Grid.parse(text)
