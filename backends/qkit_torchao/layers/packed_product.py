"""Operations on packed codes, a node each for compilers: products with the weight of a converted layer, and its values.

Few rows are multiplied by the codes themselves. For more, one pass decodes the weight into memory that the next layer uses again,
and torch multiplies.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit_torchao.arithmetic.merged import dithered
from qkit_torchao.arithmetic.packing import Laid, unlay
from qkit_torchao.kernels import choose
from qkit_torchao.layers.operators import named

Parts = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None
]  #: codes, scales, zeros, tensor scale and biases in the layout `words`


def multiply_packed(x: Tensor, parts: Parts, bias: Tensor | None, grid: str) -> Tensor:
    """x [..., inputs] times packed codes of [outputs, inputs] on the grid that prints as `grid`, plus `bias`."""
    y: Tensor = torch.ops.qkit.packed(x, *parts, bias, grid)
    return y


def decode_packed(parts: Parts, grid: str, inputs: int, dtype: torch.dtype) -> Tensor:
    """The values [outputs, inputs] of packed codes, rounded once to `dtype`."""
    values: Tensor = torch.ops.qkit.unpacked(*parts, grid, inputs, dtype)
    return values


def spread_packed(parts: Parts, grid: str, inputs: int) -> Tensor:
    """The values [outputs, inputs] of packed codes, float32, spread within their cells: see `arithmetic.merged.dithered`."""
    values: Tensor = torch.ops.qkit.spread(*parts, grid, inputs)
    return values


def _packed(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    power: Tensor | None,
    biases: Tensor | None,
    bias: Tensor | None,
    grid: str,
) -> Tensor:
    rows, on = x.reshape(-1, x.shape[-1]), named(grid)
    if choose.multiplies(rows, on):
        y = choose.multiply(rows, codes, scales, zeros, power, biases, bias, on)
    else:
        y = F.linear(
            rows, choose.values(codes, scales, zeros, power, biases, on, inputs=x.shape[-1], dtype=x.dtype), bias
        )
    return y.reshape(*x.shape[:-1], codes.shape[0])


def _unpacked(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    power: Tensor | None,
    biases: Tensor | None,
    grid: str,
    inputs: int,
    dtype: torch.dtype,
) -> Tensor:
    return choose.values(codes, scales, zeros, power, biases, named(grid), inputs=inputs, dtype=dtype)


def _spread(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    power: Tensor | None,
    biases: Tensor | None,
    grid: str,
    inputs: int,
) -> Tensor:
    laid = Laid(codes, scales, zeros, power, named(grid), "float32", (codes.shape[0], inputs), biases)
    return dithered(unlay(laid))


_CODES = "Tensor codes, Tensor scales, Tensor? zeros, Tensor? power, Tensor? biases"
_library = torch.library.Library("qkit", "FRAGMENT")  # see `operators`
_library.define(f"packed(Tensor x, {_CODES}, Tensor? bias, str grid) -> Tensor")
_library.impl("packed", _packed, "CompositeExplicitAutograd")
_library.define(f"unpacked({_CODES}, str grid, int inputs, ScalarType dtype) -> Tensor")
_library.impl("unpacked", _unpacked, "CompositeExplicitAutograd")
_library.define(f"spread({_CODES}, str grid, int inputs) -> Tensor")
_library.impl("spread", _spread, "CompositeExplicitAutograd")


def _packed_fake(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _unpacked_fake(codes: Tensor, *more: Any) -> Tensor:
    *_, inputs, dtype = more
    return codes.new_empty((codes.shape[0], inputs), dtype=dtype)


def _spread_fake(codes: Tensor, *more: Any) -> Tensor:
    return codes.new_empty((codes.shape[0], more[-1]), dtype=torch.float32)


torch.library.register_fake("qkit::spread", _spread_fake, lib=_library)
torch.library.register_fake("qkit::packed", _packed_fake, lib=_library)
torch.library.register_fake("qkit::unpacked", _unpacked_fake, lib=_library)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *parts, bias, ctx.grid = inputs
    ctx.inputs, ctx.dtype, ctx.biased = x.shape[-1], x.dtype, bias is not None
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    to_x = to_bias = None
    if ctx.needs_input_grad[0]:
        to_x = gradient @ decode_packed(ctx.saved_tensors, ctx.grid, ctx.inputs, ctx.dtype)
    if ctx.biased and ctx.needs_input_grad[6]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0)
    return to_x, None, None, None, None, None, to_bias, None


torch.library.register_autograd("qkit::packed", _backward, setup_context=_setup, lib=_library)
