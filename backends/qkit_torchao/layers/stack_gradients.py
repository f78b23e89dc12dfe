"""The straight-through gradient of stacked experts."""

from typing import Any

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit.rules import Ste
from qkit_torchao.layers import straight_through
from qkit_torchao.layers.stacks import Stack


def with_gradient(weight: Tensor, values: Tensor, stack: Stack, grid: Grid, ste: Ste) -> Tensor:
    """`values`, with the gradient of `weight` straight through, masked where `ste` says so."""
    if ste == "identity":
        return straight_through.values_view(weight, values, grid, ste=ste)
    return stacked(weight, values, stack, grid, ste)


def stacked(weight: Tensor, values: Tensor | None, stack: Stack, grid: Grid, ste: Ste) -> Tensor:
    """`values`, or those of `weight` where they are None, with the gradient of `weight`: for compiled code and masks."""
    result: Tensor = _Stacked.apply(weight, values, stack, grid, ste)  # type: ignore[no-untyped-call]
    return result


class _Stacked(torch.autograd.Function):
    """Forward: the values of a stack. Backward: the gradient as it comes, or masked."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor | None, stack: Stack, grid: Grid, ste: Ste) -> Tensor:
        ctx.stack, ctx.grid, ctx.ste = stack, grid, ste
        if ste == "masked":
            ctx.save_for_backward(weight)
        return stack.values(weight, grid) if values is None else values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        if ctx.ste == "masked":
            (weight,) = ctx.saved_tensors
            gradient = straight_through.masked(gradient, ctx.stack.unclipped(weight, ctx.grid))
        return gradient, None, None, None, None
