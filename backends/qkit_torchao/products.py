"""Linear layers that multiply codes, not values: int8 and e4m3 on both sides, with kernels of torch's for CUDA.

Scales are applied to the product of the codes, so they may differ by row only, never along it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit.recipe import Ste
from qkit_torchao import lowering, ops

INT8_ROWS = 32  #: `torch._int_mm` wants more than 16 rows
ALIGNED = {"int8": 8, "float8": 16}  #: what inputs and outputs must be a multiple of


def kind(weight: Grid, activation: Grid | None) -> str:
    """`int8` or `float8`, if weights and inputs on these grids can be multiplied as codes; else empty."""
    if activation is None or not all(grid.group in ("row", "tensor") for grid in (weight, activation)):
        return ""
    if weight.element.kind == activation.element.kind == "integer":
        return "int8" if weight.symmetric else ""
    return "float8" if weight.element.name == activation.element.name == "e4m3" else ""


def quantized(x: Tensor, grid: Grid, *, scales: Tensor | None = None, zeros: Tensor | None = None) -> QTensor[Tensor]:
    """The rows of `x` [..., inputs] -> codes [rows, inputs], on their own scales or on given ones."""
    rows = x.reshape(-1, x.shape[-1])
    return ops.quantize(rows, grid) if scales is None else _quantize_static(rows, grid, scales=scales, zeros=zeros)


def int8(x: QTensor[Tensor], weight: Tensor, scale: Tensor) -> Tensor:
    """fp32 [rows, outputs]: the codes' product in int32, which is exact, times both scales.

    Args:
        x: rows of integer codes [rows, inputs], of any integer grid.
        weight: int8 codes [outputs, inputs] of a symmetric grid.
        scale: their fp32 scales [outputs or 1, 1].
    """
    codes = x.codes if x.zeros is None else lowering.shift(x.codes, x.grid.element)
    padded = F.pad(codes, (0, 0, 0, max(0, INT8_ROWS - len(codes))))
    product = torch._int_mm(padded, weight.T)[: len(codes)]
    if x.zeros is not None:
        zero = lowering.shift(x.zeros, x.grid.element).reshape(-1, 1).to(torch.int32)
        product = product - zero * weight.sum(dim=1, dtype=torch.int32)
    return product.to(torch.float32) * x.scales.reshape(-1, 1) * scale.reshape(1, -1)


def float8(x: QTensor[Tensor], weight: Tensor, scale: Tensor) -> Tensor:
    """bfloat16 [rows, outputs], on the tensor cores; as `int8`, for e4m3 codes. `weight` is float8_e4m3fn."""
    codes = x.codes.view(torch.float8_e4m3fn)
    by_rows = ops.scale_values(x).reshape(-1, 1).expand(len(codes), 1).contiguous()
    by_columns = scale.reshape(1, -1).expand(1, len(weight)).contiguous()
    return torch._scaled_mm(codes, weight.T, by_rows, by_columns, out_dtype=torch.bfloat16, use_fast_accum=False)


def finish(product: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`product` with the bias, typed and shaped like `x`; NaN in the rows where `x` is not finite, since codes hold no NaN."""
    rows = x.reshape(-1, x.shape[-1])
    y = product + ops.poison(rows.abs().amax(dim=-1, keepdim=True).to(torch.float32))
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], product.shape[-1])


def _quantize_static(w: Tensor, grid: Grid, *, scales: Tensor, zeros: Tensor | None = None) -> QTensor[Tensor]:
    """`quantize` on given fp32 steps, whose values are those of `fake_quantize` with the same ones; `w` is finite."""
    x = ops.group(w, grid)
    if zeros is not None:
        q = ops.asymmetric_codes(x, scales, zeros.to(torch.float32), grid.element).to(torch.uint8)
    elif grid.element.kind == "integer":
        q = ops.symmetric_codes(x, scales, grid.element).to(torch.int8)
    else:
        q, scales = ops.float_codes(x, ops.exponent(scales), grid.element), ops.exponent(scales)
    shape = grid.scale_shape(tuple(w.shape))
    zeros = None if zeros is None else zeros.reshape(shape)
    return QTensor(q.reshape(w.shape), scales.reshape(shape), grid, dtype_of(w), zeros=zeros)


class Int8Linear(torch.autograd.Function):
    """What a converted layer computes from int8 codes, for training: the gradients are those of the values, straight through.

    In 16 bits the values of codes are rounded, and their product is not that of the codes: a layer must be trained with
    the one that it will be deployed with.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        grids: tuple[Grid, Grid],
        ste: Ste,
        scales: Tensor | None,
        zeros: Tensor | None,
    ) -> Tensor:
        """x [..., inputs] -> [..., outputs]; `grids` are those of the weight and of the input."""
        held = ops.quantize(weight, grids[0])
        return finish(int8(quantized(x, grids[1], scales=scales, zeros=zeros), held.codes, held.scales), x, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.grids, ctx.ste, scales, zeros = inputs
        ctx.biased = bias is not None
        ctx.save_for_backward(x, weight, scales, zeros)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales, zeros = ctx.saved_tensors
        gradient, (on_weight, on_x) = gradients[0], ctx.grids
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_x = gradient @ ops.rounded(weight, on_weight).to(gradient.dtype)
        values = ops.rounded(x, on_x, scales=scales, zeros=zeros).reshape(-1, x.shape[-1])
        to_weight = rows.T @ values.to(gradient.dtype)
        if ctx.ste == "masked":
            to_x = torch.where(ops.unclipped(x, on_x, scales=scales, zeros=zeros), to_x, 0.0)
            to_weight = torch.where(ops.unclipped(weight, on_weight), to_weight, 0.0)
        to_bias = rows.sum(dim=0) if ctx.biased else None
        return to_x.to(x.dtype), to_weight.to(weight.dtype), to_bias, None, None, None, None
