"""Launches of the kernels of `moments.cu`: the passes of `arithmetic.moments` over moments on a GPU, with the bits of the law."""

import torch
from torch import Tensor

from qkit_torchao.arithmetic import exact_products
from qkit_torchao.kernels import cuda_factor, fits, nvrtc
from qkit_torchao.kernels.fit_launches import EXACT, launch
from qkit_torchao.kernels.nvrtc import NUMBER, POINTER

TILE = 32  #: rows and columns of a program
DIGITS = 3  #: of eight bits each

CHECK = nvrtc.Kernel("moments.cu", "check", (POINTER,) * 4 + (NUMBER,), options=EXACT)
REORDER = nvrtc.Kernel("moments.cu", "reorder", (POINTER,) * 4 + (NUMBER,), options=EXACT)
CORRELATE = nvrtc.Kernel("moments.cu", "correlate", (POINTER,) * 4 + (NUMBER,), options=EXACT)
TURN = nvrtc.Kernel("moments.cu", "turn", (POINTER,) * 2 + (NUMBER,), options=EXACT)


def faults(h: Tensor, roots: Tensor, bound: float) -> tuple[bool, bool]:
    """See `moments.faults`."""
    found = torch.zeros(2, dtype=torch.int32, device=h.device)
    _launch(CHECK, h, (h, roots, torch.tensor([bound], dtype=torch.float64, device=h.device), found))
    one, other = found.tolist()
    return bool(one), bool(other)


def factor(h: Tensor, order: Tensor, damping: float) -> Tensor:
    """See `moments.factor`.

    Raises:
        RangeError: as that.
    """
    lower = torch.empty(h.shape, dtype=torch.float64, device=h.device)
    _launch(REORDER, h, (h, order, torch.tensor([damping], dtype=torch.float64, device=h.device), lower))
    exact_products.make_lower(lower, cuda_factor.eliminate, cuda_factor.take_product)
    upper = torch.empty_like(lower)
    _launch(TURN, h, (lower, upper))
    return upper


def correlations(h: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor | None]:
    """See `moments.correlations`; and the digits of these as integers, where kernels multiply them: see `cuda_digits`."""
    found = torch.empty(h.shape, dtype=torch.float64, device=h.device)
    of_all = torch.empty(DIGITS, *h.shape, dtype=torch.int8, device=h.device) if fits.have_digits(h.device) else None
    _launch(CORRELATE, h, (h, sizes, found, of_all))
    return found, of_all


def _launch(kernel: nvrtc.Kernel, h: Tensor, tensors: tuple[Tensor | None, ...]) -> None:
    tiles = -(-len(h) // TILE)
    launch(kernel, (("DOUBLE", int(h.dtype == torch.float64)),), (tiles, tiles), tensors, (len(h),))
