"""Picks the code that adds a base and a product of factors: one pass on CUDA, else `arithmetic.merged`. The bits are the same."""

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit_torchao.arithmetic import merged
from qkit_torchao.kernels import choose

Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  #: see `layers.packed_product`


def added(w: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """`merged.added(w, b, a, scale)`."""
    if w.dim() != 2 or not w.numel() or not _has_kernels(w):
        return merged.added(w, b, a, scale)
    from qkit_torchao.kernels import cuda_merge

    return cuda_merge.merged(w, b, a, scale, torch.float32)


def is_one_pass(grid: Grid, like: Tensor, inputs: int, *, spread: bool, gained: bool = False) -> bool:
    """Whether `values` takes a base on `grid`, on the device of `like`; with `spread`, a spread one; if `gained`, with gains."""
    if not _has_kernels(like):
        return False
    from qkit_torchao.kernels import cuda_merge

    fits = cuda_merge.takes_gains if gained else cuda_merge.quantizes
    return fits(grid, inputs) and (not spread or cuda_merge.spreads(grid, inputs))


def values(
    base: Tensor | Parts, b: Tensor, a: Tensor, scale: float, dtype: torch.dtype, grid: Grid, *, spread: bool, on: bool,
    out: torch.dtype, gains: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The merged weight, rounded to `dtype`; if `on`, its values on `grid`, which `is_one_pass` accepts; rounded to `out`.

    `gains` multiply the scales of these values, or of the base if not `on`: see `arithmetic.gains`.
    """
    from qkit_torchao.kernels import cuda_merge

    return cuda_merge.merged(base, b, a, scale, dtype, grid=grid, spread=spread, on_grid=on, out=out, gains=gains)


def _has_kernels(like: Tensor) -> bool:
    return like.is_cuda and not choose.why_no_triton(like.device)
