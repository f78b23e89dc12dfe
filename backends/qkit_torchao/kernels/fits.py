"""Picks the code that fits codes to moments: kernels on CUDA, else `arithmetic.column_loops`. The bits are the same."""

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit_torchao.arithmetic import column_loops, exact_products


def has_kernels(grid: Grid, inputs: int, device: torch.device) -> bool:
    """Whether kernels fit weights of so many inputs on `grid`."""
    if not _compiles(device):
        return False
    from qkit_torchao.kernels import cuda_fit

    return cuda_fit.takes(grid, inputs)


def loops(w: Tensor, grid: Grid) -> type[column_loops.Loops]:
    """The loops over the inputs of `w` [outputs, inputs]."""
    if not has_kernels(grid, w.shape[1], w.device):
        return column_loops.Loops
    from qkit_torchao.kernels import cuda_fit

    return cuda_fit.Loops


def unit_upper(h: Tensor) -> Tensor:
    """`exact_products.unit_upper(h)`.

    Raises:
        RangeError: as that.
    """
    if not _compiles(h.device):
        return exact_products.unit_upper(h)
    from qkit_torchao.kernels import cuda_fit

    return cuda_fit.unit_upper(h)


def digits(numbers: Tensor) -> Tensor | None:
    """int8 [3, n, n]: the digits of integers up to 2^20, where kernels multiply them; else None."""
    from qkit_torchao.kernels import choose

    if not _compiles(numbers.device) or choose.why_no_triton(numbers.device):
        return None
    from qkit_torchao.kernels import cuda_digits

    return cuda_digits.digits(numbers)


def _compiles(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    from qkit_torchao.kernels import nvrtc

    return not nvrtc.why_not(device)
