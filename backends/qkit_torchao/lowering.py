"""Codes in torchao's own tensors, and out again. The only module that imports torchao, whose chatter stops here.

Containers read off torchao 0.18: `IntxUnpackedToInt8Tensor`, `Float8Tensor`, `NVFP4Tensor` and `MXTensor`. Each decodes our
codes exactly in fp32, bf16 and fp16; a test holds them to it. Scales stay in fp32, whatever the model's type.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from qkit.element import Element
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit_torchao import ops

_root = logging.getLogger()
_level, _disabled = _root.level, logging.root.manager.disable
logging.disable(logging.ERROR)  # torchao reports CUDA libraries that a CPU machine cannot load
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
        from torchao.quantization import Float8Tensor, IntxUnpackedToInt8Tensor
        from torchao.quantization.quantize_.common import KernelPreference
finally:
    logging.disable(_disabled)

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, slots=True)
class Container:
    """One of torchao's tensors: how our codes go in and come out, and whether `F.linear` takes it as a weight.

    MXTensor refuses weights without quantized inputs. Float8Tensor decodes itself transposed, so that bf16 products round
    otherwise than in the prepared layer; decoded first, they are the same.
    """

    name: str
    native: bool
    lower: Callable[[QTensor[Tensor]], Any]
    raised: Callable[[Any, Grid, str], QTensor[Tensor]]


def container(grid: Grid) -> Container:
    """The torchao tensor that holds weights on `grid`; every grid has one."""
    if grid.element.kind == "integer":
        return INTEGER
    if grid.scale == "nvfp4":
        return NVFP4
    return FLOAT8_ROWS if grid.element.bits == 8 and grid.group in ("row", "tensor") else MX


def _lower_integer(q: QTensor[Tensor]) -> Any:
    element = q.grid.element
    zeros = (
        torch.zeros(q.scales.shape, dtype=torch.int8, device=q.codes.device)
        if q.zeros is None
        else _shift(q.zeros, element)
    )
    codes = q.codes if q.zeros is None else _shift(q.codes, element)
    block = tuple(n // groups for n, groups in zip(q.shape, q.scales.shape, strict=True))
    target = getattr(torch, element.name)
    return IntxUnpackedToInt8Tensor(codes, q.scales, zeros, target, block, ops.DTYPE[q.dtype], None)


def _raise_integer(held: Any, grid: Grid, dtype: Any) -> QTensor[Tensor]:
    if grid.symmetric:
        return QTensor(held.qdata, held.scale, grid, dtype)
    zeros, codes = _unshift(held.zero_point, grid.element), _unshift(held.qdata, grid.element)
    return QTensor(codes, held.scale, grid, dtype, zeros=zeros)


def _lower_nvfp4(q: QTensor[Tensor]) -> Any:
    return NVFP4Tensor(_pairs(q.codes), q.scales.view(torch.float8_e4m3fn), 16, ops.DTYPE[q.dtype], q.tensor_scale)


def _raise_nvfp4(held: Any, grid: Grid, dtype: Any) -> QTensor[Tensor]:
    scales = held.scale.view(torch.uint8)
    return QTensor(_unpair(held.qdata), scales, grid, dtype, tensor_scale=held.per_tensor_scale)


def _lower_float8(q: QTensor[Tensor]) -> Any:
    block = [n // groups for n, groups in zip(q.shape, q.scales.shape, strict=True)]
    codes = q.codes.view(FLOAT8[q.grid.element.name])
    return Float8Tensor(codes, ops.power(q.scales), block_size=block, dtype=ops.DTYPE[q.dtype])


def _raise_float8(held: Any, grid: Grid, dtype: Any) -> QTensor[Tensor]:
    return QTensor(held.qdata.view(torch.uint8), (ops.bits(held.scale) >> 23).to(torch.uint8), grid, dtype)


def _lower_mx(q: QTensor[Tensor]) -> Any:
    rows = (*q.shape[:-1], q.scales.shape[-1])  # one scale for the whole tensor is repeated for each row
    scales = q.scales.expand(rows).contiguous().view(torch.float8_e8m0fnu)
    fp4 = q.grid.element.bits == 4
    codes = _pairs(q.codes) if fp4 else q.codes.view(FLOAT8[q.grid.element.name])
    element = torch.float4_e2m1fn_x2 if fp4 else codes.dtype
    block = q.shape[-1] // rows[-1]
    return MXTensor(codes, scales, element, block, ops.DTYPE[q.dtype], KernelPreference.EMULATED, None, False)


def _raise_mx(held: Any, grid: Grid, dtype: Any) -> QTensor[Tensor]:
    codes = _unpair(held.qdata) if grid.element.bits == 4 else held.qdata.view(torch.uint8)
    shape = grid.scale_shape(tuple(codes.shape))
    scales = held.scale.view(torch.uint8)
    return QTensor(codes, scales.reshape(-1)[: prod(shape)].reshape(shape), grid, dtype)


INTEGER = Container("IntxUnpackedToInt8Tensor", native=True, lower=_lower_integer, raised=_raise_integer)
NVFP4 = Container("NVFP4Tensor", native=True, lower=_lower_nvfp4, raised=_raise_nvfp4)
FLOAT8_ROWS = Container("Float8Tensor", native=False, lower=_lower_float8, raised=_raise_float8)
MX = Container("MXTensor", native=False, lower=_lower_mx, raised=_raise_mx)


def _shift(codes: Tensor, element: Element) -> Tensor:
    """0 .. 2^bits-1 as int8 from -2^(bits-1) on."""
    return (codes.to(torch.int16) + element.lowest).to(torch.int8)


def _unshift(codes: Tensor, element: Element) -> Tensor:
    return (codes.to(torch.int16) - element.lowest).to(torch.uint8)


def _pairs(codes: Tensor) -> Tensor:
    """Four-bit codes [..., n] two to a byte, low nibble first."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _unpair(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
