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
from qkit_torchao.cache.identity import cannot_cache
from qkit_torchao.cache.inputs import CodedInput, coded
from qkit_torchao.kernels import choose
from qkit_torchao.layers import sharded
from qkit_torchao.layers.gates import gate
from qkit_torchao.layers.products import Rows, across, float8, int8, many_float8, quantized
from qkit_torchao.layers.straight_through import PLAIN, through
from qkit_torchao.torch_private import is_transformed, parameter, version

Coded = tuple[Rows, Tensor | None]  #: the codes of an input, and its values where they are wanted


def multiply_shared(
    x: Tensor, weight: Tensor, bias: Tensor | None, grids: tuple[Grid, Grid], ste: Ste, *, taker: object, **static: Any
) -> Tensor:
    """As `products.multiply_codes`, of a weight whose codes are cached, for the layer `taker`."""
    rows, on_grid = _coded(x, grids[1], taker, static, values=True)
    y: Tensor = _Product.apply(x, weight, bias, on_grid, (rows, grids, ste, static))  # type: ignore[no-untyped-call]
    return y


def multiply_current(layer: Any, x: Tensor) -> Tensor | None:
    """`multiply_shared` for a prepared layer that trains and needs nothing else; None where it does, or is not known to fit.

    Checks only conditions that change between two calls: on a slow host, all of them take as long as a product.
    """
    if torch.compiler.is_compiling() or not (layer.dynamic and layer.training and layer.caches):
        return None
    weight, rule = parameter(layer, "weight"), layer.rule
    if weight is None or type(weight) not in PLAIN or x.dtype != weight.dtype or sharded.is_managed(layer):
        return None
    if not (layer.fits.get((x.device, x.dtype)) and x.numel()) or cannot_cache(weight):
        return None
    grids = rule.weight, rule.activation
    return multiply_shared(x, weight, parameter(layer, "bias"), grids, rule.ste, taker=layer)


def coded_input(x: Tensor, grid: Grid, *, taker: object, **static: Any) -> Rows:
    """As `products.quantized`, for the converted layer `taker`."""
    if torch.compiler.is_compiling():
        return quantized(x, grid, **static)
    return _coded(x, grid, taker, static, values=False)[0]


def _coded(x: Tensor, grid: Grid, taker: object, static: dict[str, Any], *, values: bool) -> Coded:
    """Codes and values of `x`; where its scales are its own, the same for all takers in one forward pass.

    As in `straight_through.shared`, a layer that asks again starts another pass.
    """
    if static or type(x) not in PLAIN or x.is_inference() or is_transformed():
        return _fresh(x.detach(), grid, static, values=values)
    state = grid, values, version(x), x.data_ptr()
    kept = coded.of(x)
    if kept is None:
        kept = CodedInput(x, coded)
    elif (before := kept.current(state)) is not None and id(taker) not in kept.takers:
        kept.takers.add(id(taker))
        return before  # type: ignore[no-any-return]
    kept.takers = {id(taker)}
    return kept.put(_fresh(x.detach(), grid, static, values=values), state)  # type: ignore[no-any-return]


def _fresh(x: Tensor, grid: Grid, static: dict[str, Any], *, values: bool) -> Coded:
    on_grid = torch.empty_like(x, memory_format=torch.contiguous_format) if values else None
    return quantized(x, grid, values=on_grid, **static), on_grid


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
        on_grid: Tensor,
        more: tuple[Rows, tuple[Grid, Grid], Ste, dict[str, Any]],
    ) -> Tensor:
        rows, grids, ste, static = more
        ctx.about = grids, static, bias is not None  # not the codes, which nothing going back reads
        if ste == "masked":
            ctx.save_for_backward(on_grid, weight, x)
        else:
            ctx.save_for_backward(on_grid, weight)
        if grids[0].element.kind == "integer":
            codes, factors = weight_codes.of(weight, grids[0])
            y = int8(rows, codes.codes, factors, bias, x.dtype)
        elif bias is None and grids[0].group == "row" and not choose.multiplies_codes(rows.codes):
            y = many_float8(rows, weight_codes.operand_of(weight, grids[0], _across))
            y = y if y.dtype == x.dtype else y.to(x.dtype)
        else:
            codes, factors = weight_codes.of(weight, grids[0])
            y = float8(rows, codes.codes.view(torch.float8_e4m3fn), factors, bias, x.dtype)
        if ctx.needs_input_grad[0]:  # now the device waits for the host, and going back it does not
            weight_values.launch_prepared(weight)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        on_grid, weight, *masks = ctx.saved_tensors
        grids, static, biased = ctx.about
        gradient = gradients[0]
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            known = weight_values.of(weight, grids[0], gate(weight.device, on=True), weight.dtype)
            to_x = (gradient @ known.to(gradient.dtype)).to(on_grid.dtype)
            if masks:
                to_x = through(to_x, masks[0], grids[1], **static)
        if ctx.needs_input_grad[1]:
            to_weight = (rows.T @ on_grid.reshape(-1, on_grid.shape[-1]).to(rows.dtype)).to(weight.dtype)
            if masks:
                to_weight = through(to_weight, weight, grids[0])
        if biased and ctx.needs_input_grad[2]:
            to_bias = rows.sum(dim=0)
        return to_x, to_weight, to_bias, None, None
