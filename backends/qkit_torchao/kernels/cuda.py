"""Launches of the Triton kernels: the tensors they take, their tiles, many weights at once. Imported on CUDA machines only."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.packing import Laid, Layout
from qkit_torchao.kernels import triton_passes
from qkit_torchao.kernels.launches import Kernel
from qkit_torchao.kernels.peaks import peak_numbers
from qkit_torchao.kernels.plans import ALIGNED, TAKES, constants, count_of, looks_first, plan_of, tiles
from qkit_torchao.kernels.tables import offsets, programs

Launch = Callable[..., None]
PEAK = 8192  #: elements of a tile of the program that finds the largest magnitude
INTERPRETED = triton.knobs.runtime.interpret


def takes(w: Tensor, grid: Grid) -> bool:
    """Whether the kernels take `w` on `grid`. Each program's part must begin at an aligned address."""
    return plan_of(w.shape, w.dtype, grid).takes and w.is_contiguous() and w.data_ptr() % ALIGNED == 0


def values(w: Tensor, grid: Grid, *, gate: Tensor | None = None, peak: Tensor | None = None) -> Tensor:
    """`rounding.rounded(w, grid, peak=peak)` of `w` that `takes` accepts; the bits of `w` itself where a `gate` is off."""
    result = torch.empty_like(w)
    _one(w, grid, values=result, gate=gate, shared=peak)
    return result


def quantize(
    w: Tensor,
    grid: Grid,
    *,
    values: Tensor | None = None,
    steps: Tensor | None = None,
    peak: Tensor | None = None,
) -> QTensor[Tensor]:
    """`rounding.quantize(w, grid, peak=peak)`, for tensors that `takes` accepts. Filled in the same pass, where not None:

    Args:
        values: shaped like `w`: the values of the codes.
        steps: float32, shaped like the scales: the factors of the codes; NaN where the group is not finite.
    """
    parts = _encoded(w, grid, "bytes", values=values, steps=steps, shared=peak)
    return QTensor(**parts, grid=grid, dtype=dtype_of(w))


def row_codes(x: Tensor, grid: Grid, *, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `quantize`, codes and float32 steps alone: x [..., inputs] that `quantizes_together` accepts, on a grid by rows.

    Returns:
        codes [rows, inputs]: int8, or bytes of floats; and steps [rows, 1].
    """
    plan = plan_of(x.shape, x.dtype, grid)
    codes = x.new_empty((plan.count, x.shape[-1]), dtype=torch.int8 if plan.integer else torch.uint8)
    steps = x.new_empty((plan.count, 1), dtype=torch.float32)
    _one(x, grid, values=values, codes=codes, steps=steps, layout="bytes")
    return codes, steps


def quantizes_together(w: Tensor, grid: Grid) -> bool:
    """Whether `quantize_into` takes `w` on `grid`, as `takes`: without zero points, and without a scale of the tensor."""
    return takes(w, grid) and grid.symmetric and not looks_first(grid)


def quantize_into(weights: list[Tensor], targets: list[tuple[QTensor[Tensor], Tensor]], grid: Grid) -> None:
    """Overwrites each of `targets`, codes and float32 steps as `quantize` makes them, with those of its weight; in one launch.

    Args:
        weights: tensors that `quantizes_together` accepts, of one type, and of one length of rows if groups are rows.
        targets: of the shapes of `weights`.
    """
    codes_launch(weights, targets, grid)(weights[0], targets[0][0].codes)


def codes_launch(weights: list[Tensor], targets: list[tuple[QTensor[Tensor], Tensor]], grid: Grid) -> Launch:
    """The launch of `quantize_into`, which takes the first weight and the codes of the first target later."""
    codes = [q.codes for q, _ in targets]
    counts = tuple(count_of(w, grid) for w in weights)
    small = [(q.scales.data_ptr(), steps.data_ptr()) for q, steps in targets]
    places = zip(offsets(weights), offsets(codes), small, counts, strict=True)
    rows = tuple((source, target, *addresses, count) for source, target, addresses, count in places)
    geometry = tiles(weights[0], grid)
    blocks, full = programs(rows, counts, (1, 1, 0, 0, 0), geometry, weights[0].device)

    def launch(weight: Tensor, target: Tensor) -> None:
        _many(_codes_kernel, weight, target, (blocks,), grid, geometry, full)

    return launch


def laid_out(w: Tensor, grid: Grid, layout: Layout, *, broken: Tensor, number: int) -> Laid:
    """`lay(quantize(w, grid), layout)` in one pass (nvfp4: two), for tensors that `takes` accepts; not for `words`.

    Args:
        broken: int32: its element of this `number` becomes 1 if a group has no codes, since it has NaN, or a magnitude of
            2^127 or more.
    """
    parts = _encoded(w, grid, layout, broken=broken, number=number)
    return Laid(**parts, grid=grid, dtype=dtype_of(w), shape=tuple(w.shape))


def _encoded(w: Tensor, grid: Grid, layout: Layout, **more: Any) -> dict[str, Any]:
    plan = plan_of(w.shape, w.dtype, grid)
    integer, symmetric = plan.integer, plan.symmetric
    new = partial(torch.empty, device=w.device)
    width = w.shape[-1] // 2 if layout == "pairs" else w.shape[-1]
    signed = layout == "signed" or (layout == "bytes" and integer and symmetric)
    codes = new((*w.shape[:-1], width), dtype=torch.int8 if signed else torch.uint8)
    scales = new(plan.scales, dtype=torch.float32 if integer else torch.uint8)
    zeros = None if symmetric else new(plan.scales, dtype=torch.int8 if layout == "signed" else torch.uint8)
    power = new((), dtype=torch.float32) if looks_first(grid) else None
    _one(w.detach(), grid, codes=codes, scales=scales, zeros=zeros, power=power, layout=layout, **more)
    return {"codes": codes, "scales": scales, "zeros": zeros, "tensor_scale": power}


def decodes(q: QTensor[Tensor]) -> bool:
    """Whether `dequantize` takes `q`: a code a byte, and a scale for each row."""
    known = (q.grid.element.name, q.grid.scale) in TAKES and q.grid.symmetric
    return known and q.grid.group == "row" and q.codes.is_contiguous() and q.codes.data_ptr() % ALIGNED == 0


def dequantize(q: QTensor[Tensor]) -> Tensor:
    """`rounding.dequantize(q)`, of `q` that `decodes` accepts."""
    values = torch.empty(q.codes.shape, dtype=rounding.DTYPE[q.dtype], device=q.codes.device)
    geometry = tiles(q.codes, q.grid)
    with device_of(q.codes):
        triton_passes.decode[(count_of(q.codes, q.grid),)](
            q.codes, q.scales, values, GRID=constants(q.grid), INTERPRETED=INTERPRETED, **geometry
        )
    return values


def compute_values(
    weights: list[Tensor],
    targets: list[Tensor],
    gates: list[Tensor],
    grid: Grid,
    partners: list[tuple[Tensor, ...]],
) -> None:
    """Fills each of `targets` with the values of its weight, in one launch (nvfp4: two, since it looks at whole tensors first).

    Args:
        weights: tensors that `takes` accepts, of one type, and of one length of rows if groups are rows.
        targets: of the shapes of `weights`, in one type.
        gates: bool []; where one is off, the weight itself is copied.
        partners: for each weight, the others that share its peak, if any.
    """
    looked_at, numbers = peak_numbers(weights, partners)
    peaks = torch.zeros(len(looked_at), dtype=torch.int32, device=weights[0].device) if looks_first(grid) else None
    launch = _values_launch(weights, targets, gates, grid, numbers)
    if peaks is not None:
        nothing = [0] * len(looked_at)
        seen = tuple(zip(offsets(looked_at), nothing, nothing, numbers, strict=True))
        _find_peaks(weights[0], seen, tuple(count_of(w, grid) for w in looked_at), peaks)
    launch(weights[0], targets[0], peaks)


def values_launch(weights: list[Tensor], targets: list[Tensor], gates: list[Tensor], grid: Grid) -> Launch | None:
    """The launch of `compute_values` for weights without partners, which takes the first weight and the first target later.

    None, where it would be two launches.
    """
    return None if looks_first(grid) else _values_launch(weights, targets, gates, grid, [0] * len(weights))


def _values_launch(
    weights: list[Tensor], targets: list[Tensor], gates: list[Tensor], grid: Grid, numbers: list[int]
) -> Launch:
    columns = offsets(weights), offsets(targets), [gate.data_ptr() for gate in gates], numbers[: len(weights)]
    rows = tuple(zip(*columns, strict=True))
    geometry = tiles(weights[0], grid)
    counts = tuple(count_of(w, grid) for w in weights)
    blocks, full = programs(rows, counts, (1, 1, 0, 0), geometry, weights[0].device)

    def launch(weight: Tensor, target: Tensor, peaks: Tensor | None = None) -> None:
        _many(_values_kernel, weight, target, (blocks, peaks), grid, geometry, full)

    return launch


def _many(
    kernel: Kernel,
    weight: Tensor,
    target: Tensor,
    tables: tuple[Any, ...],
    grid: Grid,
    geometry: dict[str, int],
    full: bool,
) -> None:
    """Launches a kernel over many weights, of which these are the first, by a table with a row for each program."""
    groups, group, width, warps = geometry.values()
    aligned = tuple([one.data_ptr() % ALIGNED == 0 for one in (weight, target)])
    key = (grid, groups, group, width, full, weight.dtype, target.dtype, weight.device, aligned)
    with device_of(weight):
        kernel(
            key, len(tables[0]), (weight, target, *tables, constants(grid), groups, group, width, full, INTERPRETED), warps=warps
        )  # fmt: skip


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Has the device of `x` be the current one, on which Triton launches, whatever device its arguments are on."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _one(
    w: Tensor,
    grid: Grid,
    *,
    values: Tensor | None = None,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    steps: Tensor | None = None,
    gate: Tensor | None = None,
    power: Tensor | None = None,
    layout: str = "",
    broken: Tensor | None = None,
    number: int = 0,
    shared: Tensor | None = None,
) -> None:
    plan = plan_of(w.shape, w.dtype, grid)
    (groups, group, width, warps), count, full = plan.tile, plan.count, plan.full
    peak = _peak(w, grid) if shared is None else shared.detach().view(torch.int32).reshape(1)
    parts = values, codes, scales, zeros, steps, gate, peak, power, broken
    there = tuple([part is not None for part in parts])
    aligned = values is None or values.data_ptr() % ALIGNED == 0
    key = (plan.number, layout, w.device, there, aligned, count >> 31)
    if gate is not None:
        parts = (*parts[:5], gate.view(torch.uint8), *parts[6:])
    with device_of(w):
        _one_kernel(
            key, -(-count // groups),
            (w, *parts, number, count, plan.constants, groups, group, width, layout, full, INTERPRETED), warps=warps,
        )  # fmt: skip


def _peak(w: Tensor, grid: Grid) -> Tensor | None:
    """The bits of the largest magnitude of `w`, where `grid` looks at it first."""
    if not looks_first(grid):
        return None
    peak = torch.zeros(1, dtype=torch.int32, device=w.device)
    _find_peaks(w, ((0, 0, 0, 0),), (count_of(w, grid),), peak)
    return peak


def _find_peaks(first: Tensor, rows: tuple[tuple[int, ...], ...], counts: tuple[int, ...], peaks: Tensor) -> None:
    """Raises the `peaks` of weights in groups of 16, the `first` and others; else as for `programs`."""
    geometry = {"GROUPS": PEAK // 16, "GROUP": 16, "WIDTH": 16, "num_warps": 4}
    blocks, full = programs(rows, counts, (1, 1, 0, 0), geometry, first.device)
    with device_of(first):
        triton_passes.peaks_of_many[(len(blocks),)](
            first, blocks, peaks, FULL=full, INTERPRETED=INTERPRETED, **geometry
        )


_one_kernel = Kernel(triton_passes.one)
_values_kernel, _codes_kernel = Kernel(triton_passes.values_of_many), Kernel(triton_passes.codes_of_many)
