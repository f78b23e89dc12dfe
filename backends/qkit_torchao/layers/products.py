"""Linear layers that multiply codes, not values: int8 and e4m3 on both sides, with kernels of torch's for CUDA.

Scales are applied to the product of the codes, so they may differ by row only, never along it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit.rules import Ste
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.packing import shift
from qkit_torchao.cache import codes
from qkit_torchao.kernels import choose
from qkit_torchao.layers.operators import named

INT8_ROWS = 32  #: `torch._int_mm` wants more than 16 rows
FAST = False  #: whether e4m3 products add up in fewer bits
ALIGNED = {"int8": 8, "float8": 16}  #: what inputs and outputs must be a multiple of


def kind(weight: Grid, activation: Grid | None) -> str:
    """`int8` or `float8`, if weights and inputs on these grids can be multiplied as codes; else empty."""
    if activation is None or not all(grid.group in ("row", "tensor") for grid in (weight, activation)):
        return ""
    if weight.element.kind == activation.element.kind == "integer":
        return "int8" if weight.symmetric else ""
    return "float8" if weight.element.name == activation.element.name == "e4m3" else ""


def quantized(
    x: Tensor, grid: Grid, *, scales: Tensor | None = None, zeros: Tensor | None = None, values: Tensor | None = None
) -> tuple[QTensor[Tensor], Tensor]:
    """The rows of `x` [..., inputs] -> codes [rows, inputs], on their own scales or on given ones; and their steps [rows, 1].

    Steps are float32, and NaN where the row is not finite, since codes hold no NaN. `values`, shaped like `x`, are filled with
    what the codes mean, if they are wanted.
    """
    rows = x.reshape(-1, x.shape[-1])
    steps = torch.empty(len(rows), 1, dtype=torch.float32, device=x.device)
    if scales is None:
        q = choose.quantize(rows, grid, values=None if values is None else values.view(rows.shape), steps=steps)
        return q, steps
    if values is not None:
        values.copy_(rounding.rounded(x, grid, scales=scales, zeros=zeros))
    q = _quantize_static(rows, grid, scales=scales, zeros=zeros)
    return q, steps.copy_(
        rounding.scale_values(q) + rounding.poison(rows.abs().amax(dim=-1, keepdim=True).to(torch.float32))
    )


def int8(x: QTensor[Tensor], steps: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """fp32 [rows, outputs]: the codes' product in int32, which is exact, times both scales.

    Args:
        x: rows of integer codes [rows, inputs], of any integer grid.
        steps: their steps [rows, 1].
        weight: int8 codes [outputs, inputs] of a symmetric grid.
        scale: their fp32 scales [outputs or 1, 1].
    """
    codes = x.codes if x.zeros is None else shift(x.codes, x.grid.element)
    padded = F.pad(codes, (0, 0, 0, max(0, INT8_ROWS - len(codes))))
    product = torch._int_mm(padded, weight.T)[: len(codes)]
    if x.zeros is not None:
        zero = shift(x.zeros, x.grid.element).reshape(-1, 1).to(torch.int32)
        product = product - zero * weight.sum(dim=1, dtype=torch.int32)
    return product.to(torch.float32) * steps * scale.reshape(1, -1)


def float8(x: QTensor[Tensor], steps: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """bfloat16 [rows, outputs], on the tensor cores; as `int8`, for e4m3 codes. `weight` is float8_e4m3fn."""
    codes = x.codes.view(torch.float8_e4m3fn)
    by_columns = scale.reshape(1, -1).expand(1, len(weight)).contiguous()
    return torch._scaled_mm(codes, weight.T, steps, by_columns, out_dtype=torch.bfloat16, use_fast_accum=FAST)


def finish(product: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`product` with the bias, typed and shaped like `x`."""
    y = product if bias is None else product + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], product.shape[-1])


def _quantize_static(w: Tensor, grid: Grid, *, scales: Tensor, zeros: Tensor | None = None) -> QTensor[Tensor]:
    """`quantize` on given fp32 steps, whose values are those of `fake_quantize` with the same ones; `w` is finite."""
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


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grids: tuple[str, str],
    ste: Ste,
    *,
    kept: bool = True,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    """What a converted layer computes from codes of both sides, for training: x [..., inputs] -> [..., outputs].

    In 16 bits the values of codes are rounded, and their product is not that of the codes: a layer must be trained with the one
    that it will be deployed with. The gradients are those of the values, straight through.

    Args:
        grids: of the weight and of the input, as text, since a compiler passes no other objects on.
        kept: whether the codes are kept until the weight changes, or made by every forward and backward.
        scales, zeros: of the input, where they are static.
    """
    y: Tensor = torch.ops.qkit.product(x, weight, bias, *grids, ste, kept, scales, zeros)[0]
    return y


@torch.library.custom_op("qkit::product", mutates_args=())
def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    on_weight: str,
    on_x: str,
    ste: str,
    kept: bool,
    scales: Tensor | None,
    zeros: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the values of the input, which the gradient of the weight needs."""
    held, factors = _codes(kept)(weight, named(on_weight))
    made = torch.empty_like(x, memory_format=torch.contiguous_format)
    q, steps = quantized(x, named(on_x), scales=scales, zeros=zeros, values=made)
    if held.grid.element.kind == "integer":
        return finish(int8(q, steps, held.codes, factors), x, bias), made
    return finish(float8(q, steps, held.codes.view(torch.float8_e4m3fn), factors), x, bias), made


@_product.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("qkit::product_input", mutates_args=())
def _product_input(gradient: Tensor, weight: Tensor, on_weight: str, kept: bool) -> Tensor:
    held, _ = _codes(kept)(weight, named(on_weight))
    return gradient @ choose.dequantize(replace(held, dtype=dtype_of(gradient)))


@_product_input.register_fake
def _(gradient: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], weight.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.on_weight, ctx.on_x, ctx.ste, ctx.kept, scales, zeros = inputs
    ctx.biased = bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x if ctx.ste == "masked" else None, output[1], weight, scales, zeros)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, made, weight, scales, zeros = ctx.saved_tensors
    rows = gradient.reshape(-1, gradient.shape[-1])
    to_x = to_weight = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = torch.ops.qkit.product_input(gradient, weight, ctx.on_weight, ctx.kept).to(made.dtype)
        if ctx.ste == "masked":
            inside = rounding.unclipped(x, named(ctx.on_x), scales=scales, zeros=zeros)
            to_x = torch.where(inside, to_x, 0.0)
    if ctx.needs_input_grad[1]:
        to_weight = (rows.T @ made.reshape(-1, made.shape[-1]).to(rows.dtype)).to(weight.dtype)
        if ctx.ste == "masked":
            to_weight = torch.where(rounding.unclipped(weight, named(ctx.on_weight)), to_weight, 0.0)
    if ctx.biased and ctx.needs_input_grad[2]:
        to_bias = rows.sum(dim=0)
    return to_x, to_weight, to_bias, None, None, None, None, None, None


def _codes(kept: bool) -> Callable[[Tensor, Grid], tuple[QTensor[Tensor], Tensor]]:
    return codes.of if kept else codes.fresh


_product.register_autograd(_backward, setup_context=_setup)
