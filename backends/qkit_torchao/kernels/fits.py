"""Picks the code that fits codes to moments: kernels on CUDA, else `arithmetic.column_loops`. The bits are the same."""

from types import ModuleType

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit_torchao.arithmetic import column_loops
from qkit_torchao.arithmetic import moments as arithmetic_moments


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


def moments(h: Tensor) -> ModuleType:
    """The module of passes over moments [n, n]: `arithmetic.moments`, or one with the same functions."""
    if not _compiles(h.device) or h.dtype not in (torch.float32, torch.float64):
        return arithmetic_moments
    from qkit_torchao.kernels import cuda_moments

    return cuda_moments


def have_digits(device: torch.device) -> bool:
    """Whether kernels multiply integers by their digits."""
    from qkit_torchao.kernels import choose

    return not choose.why_no_triton(device)


def _compiles(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    from qkit_torchao.kernels import nvrtc

    return not nvrtc.why_not(device)
