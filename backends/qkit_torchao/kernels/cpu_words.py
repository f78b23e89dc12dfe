"""qkit's C kernels over packed codes, see `arithmetic.words`: the same functions as `cuda_words`, on torch's CPU tensors.

Sums are in float32, of the exact values of the codes; the output is rounded once.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from qkit.exactness import is_exact
from qkit.grid import Grid
from qkit.native import products
from qkit.native.library import TYPES
from qkit_torchao.arithmetic import rounding, words
from qkit_torchao.kernels.geometry import scales_of

FEW = 1  #: the most rows that are multiplied without decoding: more have the bits of prepared layers


def why_not_multiplies(device: torch.device) -> str:
    """Empty, since the C library that was built has the products."""
    return ""


def multiplies(x: Tensor) -> bool:
    """Whether `multiply` takes x [rows, inputs]."""
    return 0 < len(x) <= FEW and x.dtype in rounding.DTYPE.values() and not is_exact()


@cache
def _constants(grid: Grid, outputs: int, inputs: int) -> tuple[Any, ...]:
    """The fields of `products.Weight` after the addresses, but for the type of the scales and for the tensor scale."""
    high, *low = words.PLANES[grid.element.bits]
    number = isinstance(grid.group, int)
    group = grid.group if number else inputs
    groups = inputs // int(grid.group) if number else int(grid.group == "row")
    e = grid.element
    return outputs, inputs, group, groups, e.kind == "integer", high, low[0] if low else 0, words.unit(grid, inputs)


def _weight(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, power: Tensor | None, biases: Tensor | None, grid: Grid, inputs: int
) -> products.Weight:  # fmt: skip
    e = grid.element
    kind = scales_of(grid) if scales.dtype == torch.uint8 else _name(scales.dtype)
    addresses = [None if one is None else one.data_ptr() for one in (codes, scales, zeros, biases)]
    types = products.SCALES.index(kind), 0 if biases is None else TYPES.index(_name(biases.dtype))
    tensor = 1.0 if power is None else float(power)
    return products.Weight(
        *addresses, *_constants(grid, codes.shape[0], inputs), *types, e.mantissa, e.min_exponent, tensor
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]


def multiply(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    power: Tensor | None,
    biases: Tensor | None,
    bias: Tensor | None,
    grid: Grid,
) -> Tensor:
    """As `cuda_words.multiply`."""
    x = x.contiguous()
    out = torch.empty(len(x), codes.shape[0], dtype=x.dtype)
    products.multiply(
        _weight(codes, scales, zeros, power, biases, grid, x.shape[1]), x.data_ptr(), rows=len(x), dtype=_name(x.dtype),
        bias=None if bias is None else bias.data_ptr(), out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )  # fmt: skip
    return out


def values(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, power: Tensor | None, biases: Tensor | None, grid: Grid, *,
    inputs: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """As `cuda_words.values`."""
    out = torch.empty(codes.shape[0], inputs, dtype=dtype)
    weight = _weight(codes, scales, zeros, power, biases, grid, inputs)
    products.decode(weight, out.data_ptr(), dtype=_name(dtype), threads=torch.get_num_threads())
    return out
