"""Codes in torchao's own tensors, and out again. The only module that imports torchao, whose chatter stops here.

Containers read off torchao 0.18: `IntxUnpackedToInt8Tensor`, `Float8Tensor` and `NVFP4Tensor`. Each decodes our
codes exactly in fp32, bf16 and fp16; a test holds them to it. Scales stay in fp32, whatever the model's type. On CUDA,
bfloat16 weights in symmetric int4 go into `Int4TilePackedTo4dTensor`, on which a kernel multiplies without decoding.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.element import Element
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit_torchao import ops

_disabled = logging.root.manager.disable
logging.disable(logging.ERROR)  # torchao reports CUDA libraries that a CPU machine cannot load
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
        from torchao.quantization import Float8Tensor, Int4TilePackedTo4dTensor, IntxUnpackedToInt8Tensor
finally:
    logging.disable(_disabled)

TILE_ROWS, TILE_COLUMNS, TILE_INNER = 8, 1024, 8  #: what tinygemm's kernel pads to, and its inner_k_tiles


@dataclass(frozen=True, slots=True)
class Container:
    """One of torchao's tensors: how our codes go in, and how they come out."""

    name: str
    lower: Callable[[QTensor[Tensor]], Any]
    raised: Callable[[Any, Grid, str], QTensor[Tensor]]


def container_of(held: Tensor) -> Container:
    """The container that `held` is."""
    return next(one for one in (INTEGER, TILES, NVFP4, FLOAT8_ROWS) if one.name == type(held).__name__)


def _lower_integer(q: QTensor[Tensor]) -> Any:
    element = q.grid.element
    zeros = (
        torch.zeros(q.scales.shape, dtype=torch.int8, device=q.codes.device)
        if q.zeros is None
        else shift(q.zeros, element)
    )
    codes = q.codes if q.zeros is None else shift(q.codes, element)
    block = tuple(n // groups for n, groups in zip(q.shape, q.scales.shape, strict=True))
    target = getattr(torch, element.name)
    return IntxUnpackedToInt8Tensor(codes, q.scales, zeros, target, block, ops.DTYPE[q.dtype], None)


def _raise_integer(held: Any, grid: Grid, dtype: Any) -> QTensor[Tensor]:
    if grid.symmetric:
        return QTensor(held.qdata, held.scale, grid, dtype)
    zeros, codes = unshift(held.zero_point, grid.element), unshift(held.qdata, grid.element)
    return QTensor(codes, held.scale, grid, dtype, zeros=zeros)


def fits_tiles(q: QTensor[Tensor]) -> bool:
    """Whether tinygemm's kernel takes `q`: int4 in its groups, and no zero points, which it would hold as rounded bfloat16."""
    on_tensor_cores = q.codes.is_cuda and torch.cuda.get_device_capability(q.codes.device) >= (8, 0)
    fits = (
        q.grid.element.name == "int4" and q.grid.symmetric and q.grid.group in (32, 64, 128, 256) and len(q.shape) == 2
    )
    return on_tensor_cores and fits and q.dtype == "bfloat16"


def _lower_tiles(q: QTensor[Tensor]) -> Any:
    """Rows padded to 8 and columns to 1024, two codes to a byte with the first high, then permuted by the kernel's own packer."""
    rows, columns = q.shape
    more = (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS)
    codes = F.pad(unshift(q.codes, q.grid.element), more, value=-q.grid.element.lowest)
    scales = F.pad(q.scales, (0, more[1] // int(q.grid.group), 0, more[3])).to(torch.bfloat16)
    high_first = codes[:, 0::2] << 4 | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(high_first.contiguous(), TILE_INNER)
    scale_and_zero = torch.stack([scales, torch.zeros_like(scales)], dim=-1).transpose(0, 1).contiguous()
    return Int4TilePackedTo4dTensor(packed, scale_and_zero, [1, int(q.grid.group)], torch.Size(q.shape))


def _raise_tiles(held: Any, grid: Grid, dtype: Any) -> QTensor[Tensor]:
    """The permutation is the kernel's secret: the codes are its product of the identity with scales of one, which is exact."""
    rows, columns = held.shape
    padded = held.scale_and_zero.shape[0] * int(grid.group)
    ones = torch.stack(
        [torch.ones_like(held.scale_and_zero[..., 0]), torch.zeros_like(held.scale_and_zero[..., 0])], dim=-1
    )
    identity = torch.eye(padded, dtype=torch.bfloat16, device=held.device)
    codes = torch.ops.aten._weight_int4pack_mm(identity, held.qdata, int(grid.group), ones.contiguous())
    scales = held.scale_and_zero[..., 0].transpose(0, 1)[:rows, : columns // int(grid.group)]
    return QTensor(codes.T[:rows, :columns].to(torch.int8).contiguous(), scales.float().contiguous(), grid, dtype)


def _lower_nvfp4(q: QTensor[Tensor]) -> Any:
    return NVFP4Tensor(pairs(q.codes), q.scales.view(torch.float8_e4m3fn), 16, ops.DTYPE[q.dtype], q.tensor_scale)


def _raise_nvfp4(held: Any, grid: Grid, dtype: Any) -> QTensor[Tensor]:
    scales = held.scale.view(torch.uint8)
    return QTensor(unpair(held.qdata), scales, grid, dtype, tensor_scale=held.per_tensor_scale)


def _lower_float8(q: QTensor[Tensor]) -> Any:
    block = [n // groups for n, groups in zip(q.shape, q.scales.shape, strict=True)]
    codes = q.codes.view(ops.FLOAT8[q.grid.element.name])
    return Float8Tensor(codes, ops.power(q.scales), block_size=block, dtype=ops.DTYPE[q.dtype])


def _raise_float8(held: Any, grid: Grid, dtype: Any) -> QTensor[Tensor]:
    return QTensor(held.qdata.view(torch.uint8), (ops.bits(held.scale) >> 23).to(torch.uint8), grid, dtype)


INTEGER = Container("IntxUnpackedToInt8Tensor", lower=_lower_integer, raised=_raise_integer)
NVFP4 = Container("NVFP4Tensor", lower=_lower_nvfp4, raised=_raise_nvfp4)
FLOAT8_ROWS = Container("Float8Tensor", lower=_lower_float8, raised=_raise_float8)
TILES = Container("Int4TilePackedTo4dTensor", lower=_lower_tiles, raised=_raise_tiles)


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
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
