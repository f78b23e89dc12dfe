"""Compares the Triton kernels, run by Triton's interpreter on a CPU, with the reference. Run by test_kernels.py."""

import os
import sys
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton

import numpy as np
import torch
from qkit_torchao.arithmetic import merged as arithmetic
from qkit_torchao.arithmetic import packing, rounding
from qkit_torchao.arithmetic.gains import gained
from qkit_torchao.backend import TorchaoBackend
from qkit_torchao.cache import codes, values
from qkit_torchao.cache.ahead import Ahead
from qkit_torchao.kernels import choose, cuda, cuda_merge

from qkit import reference
from qkit.grid import Grid
from qkit.testing.hard_tensors import all_grids, random
from qkit.testing.parity import compare


class Interpreted(TorchaoBackend):
    """torch with the kernels, although its tensors are on the CPU."""

    def quantize(self, w, grid):
        return cuda.quantize(w, grid) if cuda.takes(w, grid) else rounding.quantize(w, grid)

    def dequantize(self, q):
        return cuda.dequantize(q) if cuda.decodes(q) else rounding.dequantize(q)

    def fake_quantize(self, w, grid, *, ste="identity", scales=None, zeros=None):
        if scales is not None or not cuda.takes(w, grid):
            return rounding.rounded(w, grid, scales=scales, zeros=zeros)
        made = torch.empty_like(w)
        cuda.compute_values([w], [made], [torch.tensor(True)], grid, [()])
        assert torch.equal(torch.nan_to_num(made), torch.nan_to_num(cuda.values(w, grid)))
        return made


def long(grid: Grid, dtype: str) -> bool:
    """Whether groups that are longer than a tile, which are read twice, get the reference's codes, steps and values."""
    w = torch.randn(4, int(grid.group), generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    w[1], w[2], w[3, -1] = w[1] * 2.0**-60, 0, 77.0
    assert cuda.takes(w, grid)
    made, want = cuda.quantize(w, grid), rounding.quantize(w, grid)
    same = all(torch.equal(made.parts()[name], part) for name, part in want.parts().items())
    return same and torch.equal(cuda.values(w, grid), rounding.rounded(w, grid))


def together(grid: Grid, dtype: str) -> bool:
    """Whether codes, scales and steps of several weights, overwritten in one launch, are those of each alone."""
    drawn, kind, width = torch.Generator().manual_seed(0), getattr(torch, dtype), 8208 if grid.group == "row" else 512
    weights = [torch.randn(rows, width, generator=drawn).to(kind) for rows in (3, 1, 18)]
    weights[0][1], weights[2][5], weights[2][7, 3] = 0, weights[2][5] * 2.0**-60, torch.nan
    wanted, targets = [], []
    for w in weights:
        steps = torch.zeros(grid.scale_shape(tuple(w.shape)))
        wanted.append((cuda.quantize(w, grid, steps=steps), steps))
        q = cuda.quantize(torch.ones_like(w), grid)
        targets.append((q, torch.zeros_like(steps)))
    assert all(cuda.quantizes_together(w, grid) for w in weights)
    cuda.quantize_into(weights, targets, grid)
    parts = [(q.codes, q.scales, steps) for q, steps in targets], [(q.codes, q.scales, steps) for q, steps in wanted]
    pairs = [pair for made, want in zip(*parts, strict=True) for pair in zip(made, want, strict=True)]
    return all(torch.equal(torch.nan_to_num(one.float()), torch.nan_to_num(other.float())) for one, other in pairs)


def laid(grid: Grid, layout: packing.Layout, dtype: str) -> bool:
    """Whether codes that a kernel lays out are those of `quantize`, laid out, and a group without codes is told of."""
    w = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    w[3], w[4], w[5, :7] = 0, w[4] * 2.0**-20, w[5].abs().max()
    broken = torch.zeros(3, dtype=torch.int32)
    made = cuda.laid_out(w, grid, layout, broken=broken, number=1)
    q = rounding.quantize(w, grid)
    want = packing.lay(q, layout)
    same = all(
        a is b is None or (a.dtype == b.dtype and torch.equal(a, b))
        for a, b in ((getattr(made, n), getattr(want, n)) for n in ("codes", "scales", "zeros", "tensor_scale"))
    )
    for row, wrong in enumerate((torch.nan, -torch.inf, 2.0**127)):
        w[row, 77] = wrong
        cuda.laid_out(w, grid, layout, broken=broken, number=row)
        w[row, 77] = 0
        same = same and broken.tolist() == [1] * row + [1] + [0] * (2 - row)
    return same


def shared(dtype: str) -> bool:
    """Whether weights that share a peak have the law's values, computed together or with a partner that is only looked at."""
    grid, engine = Grid("e2m1", 16, "nvfp4"), TorchaoBackend()
    weights = [random((8, 64), 1), random((4, 64), 2) * np.float32(37), random((4, 64), 3) * np.float32(2.0**-12)]
    tensors = [engine.from_numpy(w).to(getattr(torch, dtype)) for w in weights]
    peak = float(max(tensor.abs().max() for tensor in tensors))
    law = [reference.fake_quantize(engine.to_numpy(tensor), grid, peak=peak) for tensor in tensors]
    others = [tuple(tensor for tensor in tensors if tensor is not one) for one in tensors]
    gate = torch.tensor(True)
    right = []
    for some in ([0, 1, 2], [0], [2, 1]):
        made = [torch.empty_like(tensors[i]) for i in some]
        cuda.compute_values([tensors[i] for i in some], made, [gate] * len(some), grid, [others[i] for i in some])
        right += [(engine.to_numpy(one) == law[i]).all() for one, i in zip(made, some, strict=True)]
    q = cuda.quantize(tensors[2], grid, peak=torch.tensor(peak))
    right.append(
        (engine.to_numpy(q.codes) == reference.quantize(engine.to_numpy(tensors[2]), grid, peak=peak).codes).all()
    )
    return all(right)


def merged(grid: Grid, dtype: str) -> bool:
    """Whether bases, plain, packed and spread, and a product of factors have the sum and the values of the law."""
    drawn, kind = torch.Generator().manual_seed(0), getattr(torch, dtype)
    w = torch.randn(70, 512, generator=drawn).to(kind)
    w[1] = 0
    b, a = (torch.randn(*shape, generator=drawn) * 0.1 for shape in ((70, 5), (5, 512)))
    sums = arithmetic.stored(arithmetic.added(w, b, a, 0.3), kind)
    right = [torch.equal(cuda_merge.merged(w, b, a, 0.3, kind), sums)]
    if cuda_merge.quantizes(grid, 512):
        found = cuda_merge.merged(w, b, a, 0.3, kind, grid=grid, on_grid=True, out=torch.bfloat16)
        right.append(torch.equal(found, rounding.rounded(sums, grid).to(torch.bfloat16)))
    q = rounding.quantize(w.float(), grid)
    laid = packing.lay(q, "words")
    parts = laid.codes, laid.scales, laid.zeros, laid.tensor_scale, laid.biases
    gains = torch.randn(70, 1, 1, generator=drawn) * 0.2
    gains[3:6] = torch.tensor([3.0, -3.0, 0.0])[:, None, None]  # beyond the limits
    for spread in (False, True) if cuda_merge.spreads(grid, 512) else (False,):
        base = arithmetic.dithered(q) if spread else rounding.dequantize(q)
        want = arithmetic.added(base, b, a, 0.3)
        options = {"grid": grid, "spread": spread}
        right.append(torch.equal(cuda_merge.merged(parts, b, a, 0.3, torch.float32, **options), want))
        if cuda_merge.quantizes(grid, 512):
            found = cuda_merge.merged(parts, b, a, 0.3, torch.float32, **options, on_grid=True)
            right.append(torch.equal(found, rounding.rounded(want, grid)))
        if cuda_merge.takes_gains(grid, 512):
            found = cuda_merge.merged(parts, b, a, 0.3, torch.float32, **options, on_grid=True, gains=gains)
            law = rounding.dequantize(gained(rounding.quantize(want, grid), gains))
            beside = arithmetic.added(rounding.dequantize(gained(replace(q, dtype="float32"), gains)), b, a, 0.3)
            made = cuda_merge.merged(parts, b, a, 0.3, torch.float32, grid=grid, gains=gains)
            right += [torch.equal(found, law), torch.equal(made, beside)]
    return all(right) and cuda_merge.takes(grid, 512)


def ahead(dtype: str) -> bool:
    """Whether launches that are prepared after a step compute the values and codes of weights as they are when these are used."""
    choose.on_gpu = lambda w: cuda
    grid, rows, kind, gate = Grid("int4", 32), Grid("e4m3", "row"), getattr(torch, dtype), torch.tensor(True)
    drawn, launched, launch = torch.Generator().manual_seed(0), [], Ahead.launch
    Ahead.launch = lambda one: launched.append(launch(one)) or launched[-1]
    weights = [torch.nn.Parameter(torch.randn(64, 64, generator=drawn).to(kind)) for _ in range(3)]
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    edits = [
        lambda w: None,
        lambda w: w.detach().mul_(2),  # torch counts it
        lambda w: w.data.mul_(3),  # nothing shows it
        lambda w: setattr(w, "data", w.data * 5),  # in other memory
        lambda w: (values.drop(w), w.data.neg_()),
        lambda w: None,
    ]
    right = []
    for edit in edits:
        for _ in range(2):  # values that were used since the last step are prepared
            for w in weights:
                right.append(torch.equal(values.of(w, grid, gate, kind), rounding.rounded(w.detach(), grid)))
                q, want = codes.of(w, rows)[0], rounding.quantize(w.detach(), rows)
                right.append(torch.equal(q.codes, want.codes) and torch.equal(q.scales, want.scales))
                w.grad = torch.randn(64, 64, generator=drawn).to(kind)
            optimizer.step()
        edit(weights[1])
    return all(right) and [len(found) for found in launched[:4]] == [3] * 4


def main(dtype: str) -> None:
    """One grid for each element and rule, and what does not fit a tile; the others differ in constants only."""
    np.seterr(all="ignore")  # the interpreter computes in NumPy, also what is then not taken
    rest = [Grid("int4", "row", "minmax"), Grid("int4", 43), Grid("e2m1", 48)]
    for grid in [grid for grid in all_grids() if grid.group in (32, 16)] + rest:
        found = compare(Interpreted(), grid, dtype=dtype, compiled=False, size=1 << 9)
        print(grid, found.compared, found.error or ("exact" if found.exact else found), flush=True)
    for grid in [grid for grid in all_grids() if grid.element.bits == 4 and grid.group in (16, 32, 256)]:
        layout = "pairs" if grid.element.kind == "float" else "signed"
        print(grid, "in", layout, "exact" if laid(grid, layout, dtype) else "not the codes of quantize", flush=True)
    for grid in (Grid("int3", 20000), Grid("int4", 8200, "minmax"), Grid("e4m3", 8208)):
        print(grid, "in parts", "exact" if long(grid, dtype) else "not the codes of quantize", flush=True)
    few = [
        Grid("int4", 32),
        Grid("int8", 16, "absmax"),
        Grid("int2", 128),
        Grid("int3", 256),
        Grid("int4", 64, "minmax"),
    ]
    for grid in [*few, Grid("e2m1", 32, "even"), Grid("e2m1", 16, "nvfp4"), Grid("e4m3", 32, "rceil")]:
        print(grid, "merged", "exact" if merged(grid, dtype) else "not the values of the law", flush=True)
    for grid in (Grid("e4m3", "row"), Grid("int8", "row", "midmax"), Grid("int4", 32)):
        print(grid, "together", "exact" if together(grid, dtype) else "not the codes of each alone", flush=True)
    print("prepared launches", "exact" if ahead(dtype) else "not those of the weights", flush=True)
    print("shared peaks", "exact" if shared(dtype) else "not the values of the law", flush=True)
    row = Grid("int4", "row", "minmax")
    print(row, "in signed", "exact" if laid(row, "signed", dtype) else "not the codes of quantize", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
