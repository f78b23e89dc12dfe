"""Exact products of integers of 20 bits as digits, on tensor cores: launches. The device code is in `triton_digits`."""

import torch
from torch import Tensor

from qkit_torchao.kernels import triton_digits
from qkit_torchao.kernels.cuda import INTERPRETED, device_of
from qkit_torchao.kernels.cuda_rows import limits
from qkit_torchao.kernels.launches import Kernel

DIGITS = 3  #: of eight bits each
BAND = 8  #: tiles of rows that share columns in the cache
LARGE = (128, 64, 128, 8)  #: rows, columns, inputs and warps of a tile: 216 KB of shared memory in three stages
SMALL = (64, 64, 64, 4)  #: for devices of less shared memory


def subtract_product(
    out: Tensor, left: Tensor, units: Tensor, right: Tensor, sizes: Tensor, *, more: Tensor | None = None
) -> None:
    """out [rows, columns] -= units [rows] * sizes [columns] * left [rows, k] @ right.T, both as digits; k is at most 4,096.

    Args:
        more: numbers [rows, columns] that are added to these before.
    """
    (rows, columns), inputs = out.shape, left.shape[2]
    if not columns:
        return
    down, across, deep, warps = _tile(out.device)
    tensors = out, left, right, units, sizes
    strides = out.stride(0), left.stride(0), left.stride(1), right.stride(0), right.stride(1)
    key = (
        out.device,
        inputs,
        tuple((stride % 16 == 0, stride < 2**31) for stride in strides),
        tuple(t.data_ptr() % 16 for t in tensors),
        more is None,
    )
    with device_of(out):
        _product(
            key, -(-rows // down) * -(-columns // across),
            (*tensors, more, rows, columns, *strides, inputs, down, across, deep, BAND), warps=warps,
        )  # fmt: skip


def _tile(device: torch.device) -> tuple[int, int, int, int]:
    rows, columns, inputs, _ = LARGE
    return SMALL if INTERPRETED or limits(device)[0] < 3 * DIGITS * (rows + columns) * inputs else LARGE


_product = Kernel(triton_digits.subtract_product)
