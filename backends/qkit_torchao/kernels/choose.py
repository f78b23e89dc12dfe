"""Quantizing outside of autograd: by a kernel where there is one for the tensor, else by `ops`; the same bits."""

from functools import cache
from importlib.util import find_spec
from itertools import compress
from types import ModuleType

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.packing import Laid, Layout
from qkit_torchao.kernels import cpu


def rounded(w: Tensor, grid: Grid) -> Tensor:
    """`ops.rounded(w, grid)`."""
    kernels = _kernels(w)
    return kernels.values(w, grid) if kernels and kernels.takes(w, grid) else rounding.rounded(w, grid)


def gated(x: Tensor, grid: Grid, gate: Tensor) -> Tensor:
    """`rounded(x, grid)` where `gate` is on, else `x`; always in new memory."""
    kernels = _kernels(x)
    if kernels and kernels.takes(x, grid):
        made: Tensor = kernels.values(x, grid, gate=gate)
        return made
    return torch.where(gate, rounding.rounded(x, grid), x) if x.numel() else x.clone()


def quantize(w: Tensor, grid: Grid, *, values: Tensor | None = None, steps: Tensor | None = None) -> QTensor[Tensor]:
    """`ops.quantize(w, grid)`. Filled besides, if wanted:

    Args:
        values: shaped like `w`: what the codes mean.
        steps: float32, shaped like the scales: what the codes are multiplied with; NaN where the group is not finite.
    """
    kernels = _kernels(w)
    if kernels and kernels.takes(w, grid):
        made: QTensor[Tensor] = kernels.quantize(w, grid, values=values, steps=steps)
        return made
    q = rounding.quantize(w, grid)
    if values is not None:
        values.copy_(rounding.rounded(w, grid))
    if steps is not None:
        steps.copy_(rounding.scale_values(q) + rounding.poison(rounding.amax(rounding.group(w, grid))))
    return q


def lays_out(w: Tensor, grid: Grid) -> bool:
    """Whether kernels write the codes of `w` as a layer holds them: on a GPU."""
    kernels = _kernels(w)
    return w.is_cuda and kernels is not None and kernels.takes(w, grid)


def laid_out(w: Tensor, grid: Grid, layout: Layout, *, broken: Tensor, number: int) -> Laid | None:
    """See `launch.laid_out`; for what `lays_out`."""
    kernels = _launch()
    assert kernels is not None
    made: Laid | None = kernels.laid_out(w, grid, layout, broken=broken, number=number)
    return made


def dequantize(q: QTensor[Tensor]) -> Tensor:
    """`ops.dequantize(q)`."""
    kernels = _kernels(q.codes)
    if kernels and kernels.decodes(q):
        made: Tensor = kernels.dequantize(q)
        return made
    return rounding.dequantize(q)


def make_values(weights: list[Tensor], made: list[Tensor], gates: list[Tensor], grid: Grid) -> None:
    """Fills each of `made` with the values of its weight, or with the weight itself where its gate is off.

    Weights are of one type and on one device. One launch, where kernels take all of them.
    """
    kernels = _kernels(weights[0])
    together = [bool(kernels and kernels.takes(w, grid)) for w in weights]
    for w, values, gate, taken in zip(weights, made, gates, together, strict=True):
        if not taken:
            values.copy_(torch.where(gate, rounding.rounded(w, grid), w))
    if kernels and any(together):
        parts = [list(compress(tensors, together)) for tensors in (weights, made, gates)]
        kernels.make_values(*parts, grid)
        torch.autograd.graph.increment_version(parts[1])  # a backward that waits for what was there before is told


def _kernels(w: Tensor) -> ModuleType | None:
    """The module that launches kernels, for tensors on a GPU that Triton writes code for, and on CPUs where they were built."""
    if torch.compiler.is_compiling():
        return None
    if w.is_cuda:
        return _launch()
    return cpu if w.device.type == "cpu" and cpu.available() else None


@cache
def _launch() -> ModuleType | None:
    if not find_spec("triton"):
        return None
    from qkit_torchao.kernels import cuda

    return cuda
