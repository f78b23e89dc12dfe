"""The layouts of a converted layer's codes in memory, by torch's operations. `kernels.cuda` writes the same in one pass.

`bytes`: as a `QTensor` has them. `signed`: int8, those of unsigned integers and their zero points from -2^(bits-1) on. `pairs`:
two of four bits to a byte, low nibble first. `tiles`: int32, as tinygemm's kernel wants int4, see
`kernels.triton_tinygemm`; with their scales.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.element import Element
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor
from qkit_torchao.torch_private import pack_int4

Layout = Literal["bytes", "signed", "pairs", "tiles"]
TILE_ROWS, TILE_COLUMNS, TILE_INNER = 8, 1024, 8  #: multiples that tinygemm's kernel pads to, and its inner_k_tiles


@dataclass(frozen=True, slots=True, eq=False)
class Laid:
    """A quantized tensor of `shape`: as a `QTensor`, but with its codes in a layout.

    In `tiles`, codes are [rows / 8, columns / 128, 32, 4] and scales bfloat16 [groups, rows, 2], each with a zero after it.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    tensor_scale: Tensor | None
    grid: Grid
    dtype: DType
    shape: tuple[int, ...]


def lay(q: QTensor[Tensor], layout: Layout) -> Laid:
    """`q` in `layout`."""
    codes, scales, zeros, element = q.codes, q.scales, q.zeros, q.grid.element
    if layout == "signed" and zeros is not None:
        codes, zeros = shift(codes, element), shift(zeros, element)
    elif layout == "pairs":
        codes = pairs(codes)
    elif layout == "tiles":
        codes, scales = _tiles(q)
    return Laid(codes, scales, zeros, q.tensor_scale, q.grid, q.dtype, q.shape)


def _tiles(q: QTensor[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows padded to 8 and columns to 1024, two codes to a byte with the first high, then permuted by the kernel's own packer."""
    rows, columns = q.shape
    more = (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS)
    codes = F.pad(unshift(q.codes, q.grid.element), more, value=-q.grid.element.lowest)
    scales = F.pad(q.scales, (0, more[1] // int(q.grid.group), 0, more[3])).to(torch.bfloat16)
    high_first = codes[:, 0::2] << 4 | codes[:, 1::2]
    packed = pack_int4(high_first.contiguous(), TILE_INNER)
    return packed, torch.stack([scales, torch.zeros_like(scales)], dim=-1).transpose(0, 1).contiguous()


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
