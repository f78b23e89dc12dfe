"""Launches of the kernel that merges a base and factors, see `triton_merge`. Imported on CUDA machines only."""

import torch
import triton
from torch import Tensor

from qkit.grid import Grid
from qkit_torchao.kernels import triton_merge
from qkit_torchao.kernels.cuda import device_of

ROWS, COLUMNS = 32, 128  #: of a program's tile
LONGEST = 512  #: the longest group that a tile holds


def spreads(grid: Grid, inputs: int) -> bool:
    """Whether `added` spreads a base on `grid`: integers with a sign, in groups that are powers of two."""
    group = grid.group
    fits = isinstance(group, int) and 1 < group <= LONGEST and group & (group - 1) == 0 and inputs % group == 0
    return fits and grid.element.kind == "integer" and grid.symmetric and not grid.read


def added(w: Tensor, b: Tensor, a: Tensor, *, scales: Tensor | None = None, group: int = 1) -> Tensor:
    """w [outputs, inputs] + B A in float32; B [outputs, rank] and A [rank, inputs] are shortened. One pass.

    Args:
        scales: [outputs, inputs / group], of a decoded base on a grid that `spreads` accepts: then `w` is spread first.
    """
    outputs, inputs = w.shape
    columns = max(COLUMNS, group) if scales is not None else COLUMNS
    out = torch.empty(outputs, inputs, dtype=torch.float32, device=w.device)
    programs = triton.cdiv(outputs, ROWS) * triton.cdiv(inputs, columns)
    with device_of(w):
        triton_merge.added[(programs,)](
            w.contiguous(), None if scales is None else scales.contiguous(), b.contiguous(), a.contiguous(), out, outputs,
            INPUTS=inputs, RANK=a.shape[0], GROUP=group, BR=ROWS, BC=columns,
        )  # fmt: skip
    return out
