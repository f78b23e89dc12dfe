"""Exact products of integers of 20 bits as digits, on tensor cores: launches. The device code is in `triton_digits`."""

import torch
from torch import Tensor

from qkit_torchao.kernels import triton_digits
from qkit_torchao.kernels.cuda import device_of
from qkit_torchao.kernels.launches import Kernel

DIGITS = 3  #: of eight bits each
BAND = 8  #: tiles of rows that share columns in the cache
TILE = (128, 64, 64, 8)  #: rows, columns, inputs and warps


def digits(numbers: Tensor) -> Tensor:
    """int8 [3, ...] of integers [...] up to 2^20, the lowest first: their sum, times 1, 256 and 65,536."""
    rest, found = numbers.to(torch.int32), torch.empty(DIGITS, *numbers.shape, dtype=torch.int8, device=numbers.device)
    for digit in found:
        digit.copy_(((rest + 128) & 255) - 128)
        rest = rest.sub_(digit).bitwise_right_shift_(8)
    return found


def subtract_product(out: Tensor, left: Tensor, units: Tensor, right: Tensor, sizes: Tensor) -> None:
    """out [rows, columns] -= units [rows] * sizes [columns] * left [rows, k] @ right.T, both as digits; k is at most 4,096."""
    (rows, columns), inputs = out.shape, left.shape[2]
    down, across, deep, warps = TILE
    tensors = out, left, right, units, sizes
    strides = out.stride(0), left.stride(0), right.stride(0), right.stride(1)
    key = (
        out.device,
        inputs,
        tuple((stride % 16 == 0, stride < 2**31) for stride in strides),
        tuple(t.data_ptr() % 16 for t in tensors),
    )
    with device_of(out):
        _product(
            key, -(-rows // down) * -(-columns // across),
            (*tensors, rows, columns, *strides, inputs, down, across, deep, BAND), warps=warps,
        )  # fmt: skip


_product = Kernel(triton_digits.subtract_product)
