"""Picks the code that adds a base and a product of factors: one pass on CUDA, else `arithmetic.merged`. The bits are the same."""

from torch import Tensor

from qkit.grid import Grid
from qkit_torchao.arithmetic import merged
from qkit_torchao.kernels import choose


def added(w: Tensor, b: Tensor, a: Tensor, scale: float, spread: tuple[Tensor, int] | None = None) -> Tensor:
    """`merged.added(w, b, a, scale)`; with `spread`, of the base `merged.dithered`, of which `w` is the decoded one.

    Args:
        spread: the scales [outputs, groups] of the base, and the length of a group, if `spreads` is true.
    """
    if not _in_one_pass(w):
        return merged.added(w, b, a, scale)
    from qkit_torchao.kernels import cuda_merge

    short = merged.shorten(b.float() * scale), merged.shorten(a.float())
    scales, group = spread or (None, 1)
    return cuda_merge.added(w, *short, scales=scales, group=group)


def spreads(grid: Grid, like: Tensor, inputs: int) -> bool:
    """Whether `added` spreads a base on `grid`, on the device of `like`."""
    if not _in_one_pass(like, dimensions=like.dim()):
        return False
    from qkit_torchao.kernels import cuda_merge

    return cuda_merge.spreads(grid, inputs)


def _in_one_pass(w: Tensor, *, dimensions: int = 2) -> bool:
    return w.is_cuda and w.dim() == dimensions and w.numel() > 0 and not choose.why_no_triton(w.device)
