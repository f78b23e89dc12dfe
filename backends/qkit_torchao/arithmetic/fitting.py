"""The law of fitted codes on a torch device: `qkit.reference.fitting`, in fp64, with the same codes.

Products are exact, see `qkit.reference.products`; everything else is elementwise, one operation at a time. The loops over inputs
are in `column_loops`, and in `kernels.cuda_fit` for GPUs.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qkit import element as constants
from qkit.errors import GridError
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit.reference.fitting import ROUNDS
from qkit.reference.steps import want_fitted
from qkit_torchao.arithmetic import column_loops, rounding
from qkit_torchao.arithmetic.moments import DeviceMoments

SHARE = 1 << 14  #: rows that are fitted at once


def solve_on(
    w: NDArray[Any],
    grid: Grid,
    moments: NDArray[Any] | DeviceMoments,
    *,
    device: torch.device,
    peak: float | None = None,
) -> QTensor[NDArray[Any]]:
    """As `qkit.fit(w, grid, moments, method="solve", peak=peak)` for `w` [outputs, inputs], on a device.

    Raises:
        GridError, RangeError: as `qkit.fit`. GridError also for one scale for all rows.
    """
    known = moments if isinstance(moments, DeviceMoments) else DeviceMoments.of(moments, device)
    of_all = None if peak is None else torch.tensor(peak, dtype=torch.float32, device=device)
    x = torch.tensor(np.asarray(w, np.float32), device=device)
    found = solve(x, grid, known, peak=of_all).map(lambda part: part.cpu().numpy())
    return replace(found, dtype=dtype_of(w))


@torch.no_grad()
def solve(
    w: Tensor, grid: Grid, known: DeviceMoments, *, peak: Tensor | None = None, rounds: int = ROUNDS
) -> QTensor[Tensor]:
    """As `solve_on`, for a weight that lies on the device of the moments, as its result does."""
    want_fitted(grid)
    from qkit_torchao.kernels import fits  # here: it imports this package

    loops = fits.loops(w, grid) if w.ndim == 2 else None
    if grid.group == "tensor" or loops is None or (grid.scale == "minmax" and loops is column_loops.Loops):
        raise GridError(f"{grid} of {tuple(w.shape)} is fitted by qkit.fit alone: want rows with scales of their own")
    if w.shape[1] != len(known.diagonal):
        raise GridError(f"moments of {len(known.diagonal)} inputs do not fit a weight of {w.shape[1]} inputs")
    first = rounding.quantize(w := w.detach(), grid, peak=peak)
    tensor = 1.0 if first.tensor_scale is None else float(first.tensor_scale)
    steps = rounding.scale_values(first).double()
    zeros = torch.zeros_like(steps) if first.zeros is None else first.zeros.double()

    parts = []
    for start in range(0, len(w), SHARE):
        x, s, z = (loops.laid(a[start : start + SHARE]) for a in (w, steps, zeros))
        units, s = _solve(loops(x, z, grid, known, tensor), s, rounds)
        parts.append((*_stored(units.T, s.T, z.T, grid, tensor), z.T.to(torch.uint8)))
    codes, scales, offsets = (torch.cat(every) for every in zip(*parts, strict=True))
    found = replace(first, codes=codes.reshape(w.shape), scales=scales.reshape(first.scales.shape))
    return found if first.zeros is None else replace(found, zeros=offsets.reshape(first.scales.shape))


def _solve(loops: column_loops.Loops, s: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Units [inputs, rows] and scales [groups, rows], from the scales of the rule."""
    searched, rule = loops.search(s)
    d = loops.differ(searched, rule)
    before = loops.times(d)
    least, allowed = loops.weigh(d, before)
    units, s = loops.feed(rule), rule.clone()
    d = loops.differ(units, rule)
    residual = loops.times(d)
    fed = loops.weigh(d, residual)[0]
    farther = _columns(~(fed < least))
    units[:, farther], residual[:, farther] = searched[:, farther], before[:, farther]
    del before, d
    for number in range(rounds):
        if not loops.descend(units, s, residual, last=number == rounds - 1):
            break
    worse = _columns(loops.exceeds(allowed, units, s, residual, begun=torch.minimum(fed, least)))
    units[:, worse], s[:, worse] = searched[:, worse], rule[:, worse]
    return units, s


def _columns(where: Tensor) -> Tensor:
    """Those few of all columns that are true."""
    return where.nonzero()[:, 0]


def _stored(units: Tensor, s: Tensor, z: Tensor, grid: Grid, tensor: float) -> tuple[Tensor, Tensor]:
    """The codes and scales of units [rows, inputs] on scales and zero points [rows, groups]; see `steps.stored`."""
    if grid.scale == "nvfp4":
        return _float_bits(units, grid), (s / tensor).to(torch.float8_e4m3fn).view(torch.uint8)
    if grid.element.kind == "float":
        return _float_bits(units, grid), rounding.exponent(s.float())
    if not grid.symmetric:
        return (units.reshape(*s.shape, -1) + z[:, :, None]).reshape(units.shape).to(torch.uint8), s.float()
    return units.to(torch.int8), s.float()


def _float_bits(units: Tensor, grid: Grid) -> Tensor:
    element = grid.element
    if element.name != "e2m1":
        return units.to(rounding.FLOAT8[element.name]).view(torch.uint8)
    magnitudes = torch.tensor(constants.E2M1_VALUES[:8], dtype=torch.float64, device=units.device)
    code = torch.searchsorted(magnitudes, units.abs().contiguous()).to(torch.uint8)
    return code | (torch.signbit(units).to(torch.uint8) << 3)
