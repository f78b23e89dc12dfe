"""Linear layers that multiply codes, not values: int8 and e4m3 on both sides, with kernels of torch's for CUDA.

Scales are applied to the product of the codes, so they may differ by row only, never along it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit.rules import Ste
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.packing import shift
from qkit_torchao.arithmetic.scale_rules import poison
from qkit_torchao.cache import codes as weight_codes
from qkit_torchao.kernels import choose
from qkit_torchao.layers.operators import named
from qkit_torchao.layers.straight_through import through
from qkit_torchao.torch_private import float8_product, int_product

INT8_ROWS = 32  #: `int_product` takes more than 16 rows only
FAST = False  #: whether sums of e4m3 products have fewer bits
ALIGNED = {"int8": 8, "float8": 16}  #: inputs and outputs are multiples of it


def kind(weight: Grid, activation: Grid | None) -> str:
    """`int8` or `float8`, if weights and inputs on these grids can be multiplied as codes; else empty."""
    if activation is None or not all(grid.group in ("row", "tensor") for grid in (weight, activation)):
        return ""
    if weight.element.kind == activation.element.kind == "integer":
        in_bytes = weight.element.bits <= 8 and activation.element.bits <= 8
        return "int8" if weight.symmetric and in_bytes else ""
    return "float8" if weight.element.name == activation.element.name == "e4m3" else ""


class Rows(NamedTuple):
    """The codes of an input, a row of codes for each of its rows, as products take them.

    Attributes:
        codes: [rows, inputs]: int8, or the bytes of e4m3.
        steps: float32 [rows, 1], the factors of the codes; NaN where the row is not finite, since codes hold no NaN.
        zeros: int8 [rows or 1, 1], to take from the codes; None where 0 has code 0.
    """

    codes: Tensor
    steps: Tensor
    zeros: Tensor | None = None


def quantized(
    x: Tensor, grid: Grid, *, scales: Tensor | None = None, zeros: Tensor | None = None, values: Tensor | None = None
) -> Rows:
    """The codes of the rows of `x` [..., inputs], on their own scales or on `scales`.

    `values`, shaped like `x`, are filled with the values of the codes, where they are not None.
    """
    if scales is None and (found := choose.row_codes(x, grid, values=values)) is not None:
        return Rows(*found)
    rows = x.reshape(-1, x.shape[-1])
    steps = torch.empty(len(rows), 1, dtype=torch.float32, device=x.device)
    if scales is None:
        q = choose.quantize(rows, grid, values=None if values is None else values.view(rows.shape), steps=steps)
    else:
        if values is not None:
            values.copy_(rounding.rounded(x, grid, scales=scales, zeros=zeros))
        q = _quantize_static(rows, grid, scales=scales, zeros=zeros)
        steps.copy_(rounding.scale_values(q) + poison(rows.abs().amax(dim=-1, keepdim=True).to(torch.float32)))
    if q.zeros is None:
        return Rows(q.codes, steps)
    return Rows(shift(q.codes, grid.element), steps, shift(q.zeros, grid.element).reshape(-1, 1))


def int8(x: Rows, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[rows, outputs]: the codes' product in int32, which is exact, times both scales, plus the bias; rounded once to `dtype`.

    Args:
        x: integer codes, of any integer grid.
        weight: int8 codes [outputs, inputs] of a symmetric grid.
        scale: their fp32 scales [outputs or 1, 1].
        bias: [outputs].
    """
    codes, steps, zeros = x
    if choose.multiplies_codes(codes):
        each = None if zeros is None else zeros.reshape(-1).expand(len(codes)).contiguous()
        few: Tensor = torch.ops.qkit.codes_product(codes, weight, each)
        return choose.scaled(few, steps, scale, bias, dtype)
    if zeros is None and choose.multiplies_rows(codes):
        many: Tensor = torch.ops.qkit.rows_product(codes, steps, weight, scale, bias, dtype)
        return many
    padded = F.pad(codes, (0, 0, 0, max(0, INT8_ROWS - len(codes))))
    product = int_product(padded, weight.T)[: len(codes)]
    if zeros is not None:
        product = product - zeros.to(torch.int32) * weight.sum(dim=1, dtype=torch.int32)
    return choose.scaled(product, steps, scale, bias, dtype)


def float8(x: Rows, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As `int8`, for e4m3 codes, on the tensor cores: rounded to bfloat16 before the bias. `weight` is float8_e4m3fn."""
    if choose.multiplies_codes(x.codes):
        few: Tensor = torch.ops.qkit.codes_product(x.codes, weight.view(torch.uint8), None)
        y = choose.scaled(few, x.steps, scale, None, torch.bfloat16)
    else:
        y = many_float8(x, across(weight, scale))
    return (y if bias is None else y + bias).to(dtype)


def across(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes [outputs, inputs] and their fp32 scales [outputs or 1, 1], as `many_float8` takes them: by columns."""
    return weight.view(torch.float8_e4m3fn).T, scale.reshape(1, -1).expand(1, len(weight)).contiguous()


def many_float8(x: Rows, weight: tuple[Tensor, Tensor]) -> Tensor:
    """The bfloat16 product of many rows of e4m3 codes and a weight as `across` returns it."""
    return float8_product(x.codes.view(torch.float8_e4m3fn), weight[0], x.steps, weight[1], fast=FAST)


def _codes_product(x: Tensor, codes: Tensor, zeros: Tensor | None) -> Tensor:
    return choose.codes_product(x, codes, zeros)


_library = torch.library.Library("qkit", "FRAGMENT")  # see `operators`
_library.define("codes_product(Tensor x, Tensor codes, Tensor? zeros) -> Tensor")
_library.impl("codes_product", _codes_product, "CompositeExplicitAutograd")


def _codes_product_fake(x: Tensor, codes: Tensor, zeros: Tensor | None) -> Tensor:
    dtype = torch.int32 if codes.dtype == torch.int8 else torch.float32
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=dtype)


torch.library.register_fake("qkit::codes_product", _codes_product_fake, lib=_library)


def _rows_product(
    x: Tensor, steps: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return choose.rows_product(x, steps, codes, scales, bias, dtype)


def _rows_product_fake(
    x: Tensor, steps: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=dtype)


_library.define(
    "rows_product(Tensor x, Tensor steps, Tensor codes, Tensor scales, Tensor? bias, ScalarType dtype) -> Tensor"
)
_library.impl("rows_product", _rows_product, "CompositeExplicitAutograd")
torch.library.register_fake("qkit::rows_product", _rows_product_fake, lib=_library)


def _quantize_static(w: Tensor, grid: Grid, *, scales: Tensor, zeros: Tensor | None = None) -> QTensor[Tensor]:
    """`quantize` on the fp32 steps `scales`, whose values are those of `fake_quantize` with the same ones; `w` is finite."""
    x = rounding.group(w, grid)
    if zeros is not None:
        q = rounding.asymmetric_codes(x, scales, zeros.to(torch.float32), grid.element).to(torch.uint8)
    elif grid.element.kind == "integer":
        q = rounding.symmetric_codes(x, scales, grid.element).to(torch.int8)
    else:
        q, scales = rounding.float_codes(x, rounding.exponent(scales), grid.element), rounding.exponent(scales)
    shape = grid.scale_shape(tuple(w.shape))
    zeros = None if zeros is None else zeros.reshape(shape)
    return QTensor(q.reshape(w.shape), scales.reshape(shape), grid, dtype_of(w), zeros=zeros)


def multiply_codes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grids: tuple[str, str],
    ste: Ste,
    *,
    cached: bool = True,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    """The product of codes of both sides, as a converted layer computes it, for training: x [..., inputs] -> [..., outputs].

    In 16 bits the values of codes are rounded, and their product is not that of the codes. A layer is therefore trained with the
    product that it is deployed with. The gradients are those of the values, straight through.

    Args:
        grids: of the weight and of the input, as text, since a compiler passes no other objects on.
        cached: whether the codes are cached until the weight changes, or computed by every forward and backward.
        scales, zeros: of the input, where they are static.
    """
    y: Tensor = torch.ops.qkit.product(x, weight, bias, *grids, ste, cached, scales, zeros)[0]
    return y


@torch.library.custom_op("qkit::product", mutates_args=())
def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    on_weight: str,
    on_x: str,
    ste: str,
    cached: bool,
    scales: Tensor | None,
    zeros: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the values of the input, which the gradient of the weight needs."""
    codes, factors = _codes(cached)(weight, named(on_weight))
    values = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = quantized(x, named(on_x), scales=scales, zeros=zeros, values=values)
    if codes.grid.element.kind == "integer":
        y = int8(rows, codes.codes, factors, bias, x.dtype)
    else:
        y = float8(rows, codes.codes.view(torch.float8_e4m3fn), factors, bias, x.dtype)
    return y.reshape(*x.shape[:-1], len(weight)), values


@_product.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("qkit::product_input", mutates_args=())
def _product_input(gradient: Tensor, weight: Tensor, on_weight: str, cached: bool) -> Tensor:
    codes, _ = _codes(cached)(weight, named(on_weight))
    return gradient @ choose.dequantize(replace(codes, dtype=dtype_of(gradient)))


@_product_input.register_fake
def _(gradient: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], weight.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.on_weight, ctx.on_x, ctx.ste, ctx.cached, scales, zeros = inputs
    ctx.biased = bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x if ctx.ste == "masked" else None, output[1], weight, scales, zeros)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, values, weight, scales, zeros = ctx.saved_tensors
    rows = gradient.reshape(-1, gradient.shape[-1])
    to_x = to_weight = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.qkit.product_input(gradient, weight, ctx.on_weight, ctx.cached).to(values.dtype)
        if ctx.ste == "masked":
            to_x = through(to_x, x, named(ctx.on_x), scales=scales, zeros=zeros)
    if ctx.needs_input_grad[1]:
        to_weight = (rows.T @ values.reshape(-1, values.shape[-1]).to(rows.dtype)).to(weight.dtype)
        if ctx.ste == "masked":
            to_weight = through(to_weight, weight, named(ctx.on_weight))
    if ctx.biased and ctx.needs_input_grad[2]:
        to_bias = rows.sum(dim=0)
    return to_x, to_weight, to_bias, None, None, None, None, None, None


def _codes(cached: bool) -> Callable[[Tensor, Grid], tuple[QTensor[Tensor], Tensor]]:
    return weight_codes.of if cached else weight_codes.fresh


_product.register_autograd(_backward, setup_context=_setup)
