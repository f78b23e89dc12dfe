"""Products of many rows of int8 codes on CUDA: tiles by the device, and launches. The device code is in `triton_rows`."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qkit_torchao.kernels import triton_rows
from qkit_torchao.kernels.cuda import INTERPRETED, device_of
from qkit_torchao.kernels.launches import Kernel

ALIGNED = 16  #: bytes; Triton compiles another form for addresses and counts that are multiples
BAND = 8  #: tiles of rows that share codes in the cache
LARGE = (128, 128, 128, 8)  #: rows, outputs, inputs and warps of a tile: 96 KB of shared memory in three stages
NARROW = (64, 128, 128, 4)  #: for at most `MANY` rows, in fewer tiles than the device has processors
MANY = 2048
SMALL = (64, 128, 64, 4)  #: for devices of less shared memory


def rows_product(
    x: Tensor, steps: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """int8 x [rows, inputs] by int8 codes [outputs, inputs], exact, times steps [rows, 1] and scales [outputs or 1], plus bias.

    In float32 and in this order after the sums; rounded once to `dtype`.
    """
    (count, inputs), outputs = x.shape, codes.shape[0]
    out = torch.empty(count, outputs, dtype=dtype, device=x.device)
    tensors = x.contiguous(), codes.contiguous(), steps.contiguous(), scales.contiguous(), bias, out
    rows, across, deep, warps = _tile(x.device, count, outputs)
    aligned = tuple(None if one is None else (one.dtype, one.data_ptr() % ALIGNED == 0) for one in tensors)
    one = scales.numel() == 1
    key = (x.device, rows, inputs, one, outputs % ALIGNED == 0, aligned)
    with device_of(x):
        _product(
            key, -(-count // rows) * -(-outputs // across),
            (*tensors, count, outputs, inputs, one, rows, across, deep, BAND, INTERPRETED), warps=warps,
        )  # fmt: skip
    return out


def _tile(device: torch.device, count: int, outputs: int) -> tuple[int, int, int, int]:
    if INTERPRETED:
        return SMALL
    shared, processors = limits(device)
    rows, across, deep, _ = LARGE
    if shared < 3 * (rows + across) * deep:
        return SMALL
    return LARGE if count > MANY or -(-count // rows) * -(-outputs // across) >= processors else NARROW


@lru_cache(maxsize=16)
def limits(device: torch.device) -> tuple[int, int]:
    """The most bytes of shared memory of a program, and how many programs run at a time."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin, properties.multi_processor_count


_product = Kernel(triton_rows.rows_product)
