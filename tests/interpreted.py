"""Compares the Triton kernels, run by Triton's interpreter on a CPU, with the reference. Run by test_kernels.py."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton

import numpy as np
import torch
from qkit_torchao import launch, lowering, ops
from qkit_torchao.backend import TorchaoBackend

from qkit.grid import Grid
from qkit.parity import compare
from qkit.testing.tensors import all_grids


class Interpreted(TorchaoBackend):
    """torch with the kernels, although its tensors are on the CPU."""

    def quantize(self, w, grid):
        return launch.quantize(w, grid) if launch.takes(w, grid) else ops.quantize(w, grid)

    def dequantize(self, q):
        return launch.dequantize(q) if launch.decodes(q) else ops.dequantize(q)

    def fake_quantize(self, w, grid, *, ste="identity", scales=None, zeros=None):
        if scales is not None or not launch.takes(w, grid):
            return ops.rounded(w, grid, scales=scales, zeros=zeros)
        made = torch.empty_like(w)
        launch.make_values([w], [made], [torch.tensor(True)], grid)
        assert torch.equal(torch.nan_to_num(made), torch.nan_to_num(launch.values(w, grid)))
        return made


def pairs(grid: Grid, dtype: str) -> bool:
    """Whether codes that are packed two to a byte are the bytes of `quantize`, in both orders."""
    w = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    w[3], w[4], w[5, :7] = 0, w[4] * 2.0**-20, w[5].abs().max()
    codes = launch.quantize(w, grid).codes
    codes = lowering.unshift(codes, grid.element) if codes.dtype == torch.int8 else codes
    swapped = codes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    made = {layout: lowering.unpair(launch.packed(w, grid, layout=layout)["codes"]) for layout in ("pairs", "tiles")}
    return torch.equal(made["pairs"], codes) and torch.equal(made["tiles"], swapped)


def main(dtype: str) -> None:
    """One grid for each element and rule, and what does not fit a tile; the others differ in constants only."""
    np.seterr(all="ignore")  # the interpreter computes in NumPy, also what is then not taken
    rest = [Grid("int4", "row", "minmax"), Grid("e4m3", "row"), Grid("int4", 43), Grid("e2m1", 48), Grid("int3", 20000)]
    for grid in [grid for grid in all_grids() if grid.group in (32, 16)] + rest:
        found = compare(Interpreted(), grid, dtype=dtype, compiled=False, size=1 << 9)
        print(grid, found.compared, found.error or ("exact" if found.exact else found), flush=True)
    for grid in [grid for grid in all_grids() if grid.element.bits == 4 and grid.group in (16, 32)]:
        print(grid, "in pairs", "exact" if pairs(grid, dtype) else "not the bytes of quantize", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
