"""The layouts of a converted layer's codes in memory, by torch's operations. `kernels.cuda` writes the same in one pass.

`bytes`: as a `QTensor` has them. `signed`: int8, those of unsigned integers and their zero points from -2^(bits-1) on. `pairs`:
two of four bits to a byte, low nibble first. `words`: int32 without gaps, whatever the width, see `words`; there signed codes
are unsigned from 0 on, and scales of integers are bfloat16 where that is exact.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qkit.element import Element
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor
from qkit_torchao.arithmetic import words

Layout = Literal["bytes", "signed", "pairs", "words"]


@dataclass(frozen=True, slots=True, eq=False)
class Laid:
    """A quantized tensor of `shape`: as a `QTensor`, but with its codes in a layout."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    tensor_scale: Tensor | None
    grid: Grid
    dtype: DType
    shape: tuple[int, ...]
    biases: Tensor | None = None


def lay(q: QTensor[Tensor], layout: Layout) -> Laid:
    """`q` in `layout`."""
    codes, scales, zeros, element = q.codes, q.scales, q.zeros, q.grid.element
    if layout == "signed" and zeros is not None:
        codes, zeros = shift(codes, element), shift(zeros, element)
    elif layout == "pairs":
        codes = pairs(codes)
    elif layout == "words":
        codes, scales = (
            words.pack(unsigned(codes, element), element.bits, words.unit(q.grid, q.shape[-1])),
            scales if q.grid.read else narrow(scales),
        )
    return Laid(codes, scales, zeros, q.tensor_scale, q.grid, q.dtype, q.shape, q.biases)


def unlay(laid: Laid) -> QTensor[Tensor]:
    """The inverse of `lay`, for codes in `bytes`, `pairs` or `words`."""
    codes, scales, grid = laid.codes, laid.scales, laid.grid
    if codes.dtype == torch.int32:
        codes = words.unpack(codes, grid.element.bits, words.unit(grid, laid.shape[-1]), laid.shape[-1])
        if grid.element.kind == "integer":
            codes = shift(codes, grid.element) if grid.symmetric else codes
            scales = scales if grid.read else scales.to(torch.float32)
    elif codes.shape[-1] != laid.shape[-1]:
        codes = unpair(codes)
    more = {"zeros": laid.zeros, "tensor_scale": laid.tensor_scale, "biases": laid.biases}
    return QTensor(codes, scales, grid, laid.dtype, **more)


def unsigned(codes: Tensor, element: Element) -> Tensor:
    """Codes as they are packed, from 0 on."""
    return unshift(codes, element) if codes.dtype == torch.int8 else codes


def narrow(scales: Tensor) -> Tensor:
    """Scales of integers as bfloat16, on whose grid qkit chooses them; as they are, where that would round one."""
    half = scales.to(torch.bfloat16)
    return half if scales.dtype == torch.float32 and torch.equal(half.to(torch.float32), scales) else scales


def shift(codes: Tensor, element: Element) -> Tensor:
    """0 .. 2^bits-1 as int8 from -2^(bits-1) on."""
    return (codes.to(torch.int16) + element.lowest).to(torch.int8)


def unshift(codes: Tensor, element: Element) -> Tensor:
    """The inverse of `shift`, as uint8."""
    return (codes.to(torch.int16) - element.lowest).to(torch.uint8)


def pairs(codes: Tensor) -> Tensor:
    """Four-bit codes [..., n] two to a byte, low nibble first."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpair(packed: Tensor) -> Tensor:
    """The inverse of `pairs`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
