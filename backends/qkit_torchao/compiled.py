"""The product with a weight's quantized values as an operation of its own, so that compiled code does not make them anew.

A compiler sees one node; when it runs, `values` is asked, which knows whether the weight has changed. Backward needs the input
and the weight only, so that a weight which is gathered for a moment leaves nothing of its size behind.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.grid import Grid
from qkit.recipe import Ste
from qkit_torchao import ops, values


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, grid: str, ste: Ste, dtype: torch.dtype, *, kept: bool
) -> Tensor:
    """x [..., inputs] times the values of `weight` [outputs, inputs] in `dtype`, straight through, plus `bias`.

    Args:
        grid: the weight's, as text, since a compiler passes no other objects on.
        kept: whether the values are kept until the weight changes, or made by every forward and backward.
    """
    narrow = bias if bias is None else bias.to(dtype)
    y: Tensor = torch.ops.qkit.linear(x.to(dtype), weight, narrow, gate, grid, ste, dtype, kept)
    return y


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
    return F.linear(x, _values(kept)(weight, named(grid), gate, dtype), bias)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("qkit::linear_input", mutates_args=())
def _linear_input(gradient: Tensor, weight: Tensor, gate: Tensor, grid: str, dtype: torch.dtype, kept: bool) -> Tensor:
    return gradient @ _values(kept)(weight, named(grid), gate, dtype)


@_linear_input.register_fake
def _(gradient: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], weight.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, gate, ctx.grid, ctx.ste, ctx.dtype, ctx.kept = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, weight, gate)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gate = ctx.saved_tensors
    to_x = to_weight = to_bias = None
    rows = gradient.reshape(-1, gradient.shape[-1])
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.qkit.linear_input(gradient, weight, gate, ctx.grid, ctx.dtype, ctx.kept)
    if ctx.needs_input_grad[1]:
        to_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.ste == "masked":
            inside = ops.unclipped(weight, named(ctx.grid)) | ~gate
            to_weight = torch.where(inside, to_weight, 0.0)
    if ctx.biased and ctx.needs_input_grad[2]:
        to_bias = rows.sum(dim=0)
    return to_x, to_weight, to_bias, None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_setup)


def _values(kept: bool) -> Callable[[Tensor, Grid, Tensor, torch.dtype], Tensor]:
    return values.of if kept else values.fresh


@cache
def named(text: str) -> Grid:
    """The grid that prints as `text`."""
    element, group, scale = text.split("-")
    return Grid(element, int(group[1:]) if group[1:].isdigit() else group, scale)  # type: ignore[arg-type]
