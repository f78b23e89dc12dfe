"""Codes of an input, quantized once for all layers that get it; and their products in eager training. Going back decodes nothing.

`products.multiply_codes` computes the same numbers as operations that a compiler can pass on, which cost the host more.
"""

from typing import Any

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.rules import Ste
from qkit_torchao.cache import codes as weight_codes
from qkit_torchao.cache import values as weight_values
from qkit_torchao.cache.inputs import CodedInput, coded
from qkit_torchao.kernels import choose
from qkit_torchao.layers.gates import gate
from qkit_torchao.layers.products import across, float8, int8, many_float8, quantized
from qkit_torchao.layers.straight_through import PLAIN, through
from qkit_torchao.torch_private import is_transformed, version

Coded = tuple[
    QTensor[Tensor], Tensor, Tensor | None
]  #: codes and steps of an input, and its values where they are wanted


def multiply_shared(
    x: Tensor, weight: Tensor, bias: Tensor | None, grids: tuple[Grid, Grid], ste: Ste, *, taker: object, **static: Any
) -> Tensor:
    """As `products.multiply_codes`, of a weight whose codes are cached, for the layer `taker`."""
    with torch.no_grad():
        q, steps, on_grid = _coded(x.detach(), x, grids[1], taker, static, values=True)
    y: Tensor = _Product.apply(x, weight, bias, q, steps, on_grid, grids, ste, static)  # type: ignore[no-untyped-call]
    return y


def coded_input(x: Tensor, grid: Grid, *, taker: object, **static: Any) -> tuple[QTensor[Tensor], Tensor]:
    """As `products.quantized`, for the converted layer `taker`."""
    if torch.compiler.is_compiling():
        return quantized(x, grid, **static)
    q, steps, _ = _coded(x, x, grid, taker, static, values=False)
    return q, steps


def _coded(x: Tensor, owner: Tensor, grid: Grid, taker: object, static: dict[str, Any], *, values: bool) -> Coded:
    """Codes, steps and values of `x`; where its scales are its own, the same for all takers in one forward pass.

    As in `straight_through.shared`, a layer that asks again starts another pass.
    """
    if static or type(owner) not in PLAIN or owner.is_inference() or is_transformed():
        return _fresh(x, grid, static, values=values)
    state = grid, values, version(owner), owner.data_ptr()
    kept = coded.of(owner)
    if kept is None:
        kept = CodedInput(owner, coded)
    elif (before := kept.current(state)) is not None and id(taker) not in kept.takers:
        kept.takers.add(id(taker))
        return before  # type: ignore[no-any-return]
    kept.takers = {id(taker)}
    return kept.put(_fresh(x, grid, static, values=values), state)  # type: ignore[no-any-return]


def _fresh(x: Tensor, grid: Grid, static: dict[str, Any], *, values: bool) -> Coded:
    on_grid = torch.empty_like(x, memory_format=torch.contiguous_format) if values else None
    return *quantized(x, grid, values=on_grid, **static), on_grid


def _across(codes: QTensor[Tensor], steps: Tensor) -> tuple[Tensor, Tensor]:
    return across(codes.codes, steps)


class _Product(torch.autograd.Function):
    """The product of codes; going back, the cached values of the weight and those of the input stand for their codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        q: QTensor[Tensor],
        steps: Tensor,
        on_grid: Tensor | None,
        grids: tuple[Grid, Grid],
        ste: Ste,
        static: dict[str, Any],
    ) -> Tensor:
        ctx.grids, ctx.ste, ctx.static, ctx.biased = grids, ste, static, bias is not None
        ctx.save_for_backward(x if ste == "masked" else None, on_grid, weight)
        if grids[0].element.kind == "integer":
            codes, factors = weight_codes.of(weight, grids[0])
            y = int8(q, steps, codes.codes, factors, bias, x.dtype)
        elif bias is None and grids[0].group == "row" and not choose.multiplies_codes(q.codes):
            y = many_float8(q.codes, steps, weight_codes.operand_of(weight, grids[0], _across)).to(x.dtype)
        else:
            codes, factors = weight_codes.of(weight, grids[0])
            y = float8(q, steps, codes.codes.view(torch.float8_e4m3fn), factors, bias, x.dtype)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, on_grid, weight = ctx.saved_tensors
        gradient = gradients[0]
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            known = weight_values.of(weight, ctx.grids[0], gate(weight.device, on=True), weight.dtype)
            to_x = (gradient @ known.to(gradient.dtype)).to(on_grid.dtype)
            if ctx.ste == "masked":
                to_x = through(to_x, x, ctx.grids[1], **ctx.static)
        if ctx.needs_input_grad[1]:
            to_weight = (rows.T @ on_grid.reshape(-1, on_grid.shape[-1]).to(rows.dtype)).to(weight.dtype)
            if ctx.ste == "masked":
                to_weight = through(to_weight, weight, ctx.grids[0])
        if ctx.biased and ctx.needs_input_grad[2]:
            to_bias = rows.sum(dim=0)
        return to_x, to_weight, to_bias, None, None, None, None, None, None
