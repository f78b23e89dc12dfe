"""Codes in torchao's own tensors: stored and read. The only module that imports torchao, whose log messages stop here.

Containers read off torchao 0.18: `IntxUnpackedToInt8Tensor`, `Float8Tensor` and `NVFP4Tensor`. Each decodes our
codes exactly in fp32, bf16 and fp16; a test holds them to it. Scales stay in fp32, whatever the model's type.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit.qtensor import DType, QTensor
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.packing import Laid, Layout, unpair, unshift
from qkit_torchao.arithmetic.scale_rules import bits

_disabled = logging.root.manager.disable
logging.disable(logging.ERROR)  # torchao reports CUDA libraries that a CPU machine cannot load
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
        from torchao.quantization import Float8Tensor, IntxUnpackedToInt8Tensor
finally:
    logging.disable(_disabled)


@dataclass(frozen=True, slots=True)
class Container:
    """One of torchao's tensors: its layout, the elements that it stores, and how codes are stored and read."""

    name: str
    layout: Layout
    elements: frozenset[str]
    store: Callable[[Laid], Any]
    read: Callable[[Any, Grid, DType], QTensor[Tensor]]


def container_of(stored: Tensor) -> Container:
    """The container that describes `stored`, a tensor of torchao's."""
    return next(one for one in (INTEGER, NVFP4, FLOAT8_ROWS) if one.name == type(stored).__name__)


def _store_integer(laid: Laid) -> Any:
    zeros = laid.zeros
    if zeros is None:
        zeros = torch.zeros(laid.scales.shape, dtype=torch.int8, device=laid.codes.device)
    target = getattr(torch, laid.grid.element.name)
    return IntxUnpackedToInt8Tensor(
        laid.codes, laid.scales, zeros, target, _block(laid), rounding.DTYPE[laid.dtype], None
    )


def _read_integer(stored: Any, grid: Grid, dtype: DType) -> QTensor[Tensor]:
    if grid.symmetric:
        return QTensor(stored.qdata, stored.scale, grid, dtype)
    zeros, codes = unshift(stored.zero_point, grid.element), unshift(stored.qdata, grid.element)
    return QTensor(codes, stored.scale, grid, dtype, zeros=zeros)


def _store_nvfp4(laid: Laid) -> Any:
    scales = laid.scales.view(torch.float8_e4m3fn)
    return NVFP4Tensor(laid.codes, scales, 16, rounding.DTYPE[laid.dtype], laid.tensor_scale)


def _read_nvfp4(stored: Any, grid: Grid, dtype: DType) -> QTensor[Tensor]:
    scales = stored.scale.view(torch.uint8)
    return QTensor(unpair(stored.qdata), scales, grid, dtype, tensor_scale=stored.per_tensor_scale)


def _store_float8(laid: Laid) -> Any:
    codes = laid.codes.view(rounding.FLOAT8[laid.grid.element.name])
    return Float8Tensor(
        codes, rounding.power(laid.scales), block_size=list(_block(laid)), dtype=rounding.DTYPE[laid.dtype]
    )


def _read_float8(stored: Any, grid: Grid, dtype: DType) -> QTensor[Tensor]:
    return QTensor(stored.qdata.view(torch.uint8), (bits(stored.scale) >> 23).to(torch.uint8), grid, dtype)


def _block(laid: Laid) -> tuple[int, ...]:
    """The shape of a group, whose codes share a scale."""
    return tuple(n // groups for n, groups in zip(laid.shape, laid.scales.shape, strict=True))


INTEGERS = frozenset(f"int{bits}" for bits in range(1, 9))  #: torch's types of integers with up to 8 bits
INTEGER = Container("IntxUnpackedToInt8Tensor", "signed", INTEGERS, store=_store_integer, read=_read_integer)
NVFP4 = Container("NVFP4Tensor", "pairs", frozenset({"e2m1"}), store=_store_nvfp4, read=_read_nvfp4)
FLOAT8_ROWS = Container("Float8Tensor", "bytes", frozenset(rounding.FLOAT8), store=_store_float8, read=_read_float8)
