"""Launching the Triton kernels: which tensors they take, in what tiles, many weights at once. Imported on CUDA machines only."""

from functools import cache, partial
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from qkit import element as elements
from qkit.element import STEP
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit_torchao import ops, passes

TILE = 2048  #: elements that a program holds, where groups are shorter
LONGEST = 8192  #: the longest group that it holds whole
WARP = 1024  #: elements of a tile for each warp; see `tiles`
ALIGNED = 16  #: bytes that are read at once
TYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = triton.knobs.runtime.interpret


def takes(w: Tensor, grid: Grid) -> bool:
    """Whether the kernels take `w` on `grid`; else `ops` does."""
    fits = w.dtype in TYPES and w.is_contiguous() and w.data_ptr() % ALIGNED == 0 and w.numel() > 0
    return fits and grid.group != "tensor"


def values(w: Tensor, grid: Grid, *, gate: Tensor | None = None) -> Tensor:
    """`ops.rounded(w, grid)`, for what `takes`; the bits of `w` itself where there is a `gate`, bool [], that is off."""
    made = torch.empty_like(w)
    _one(w, grid, peak=_peak(w, grid), values=made, gate=gate)
    return made


def quantize(w: Tensor, grid: Grid, *, values: Tensor | None = None, steps: Tensor | None = None) -> QTensor[Tensor]:
    """`ops.quantize(w, grid)`, for what `takes`. Filled in the same pass, if wanted:

    Args:
        values: shaped like `w`: what the codes mean.
        steps: float32, shaped like the scales: what the codes are multiplied with; NaN where the group is not finite.
    """
    return QTensor(**_encoded(w, grid, layout="bytes", values=values, steps=steps), grid=grid, dtype=dtype_of(w))


def packed(w: Tensor, grid: Grid, *, layout: str) -> dict[str, Tensor | None]:
    """The parts of `quantize(w, grid)` by name, but codes of four bits two to a byte: `pairs` or `tiles`, see `one`."""
    return _encoded(w, grid, layout=layout)


def _encoded(
    w: Tensor, grid: Grid, *, layout: str, values: Tensor | None = None, steps: Tensor | None = None
) -> dict[str, Any]:
    shape = grid.scale_shape(tuple(w.shape))
    new = partial(torch.empty, device=w.device)
    width = w.shape[-1] if layout == "bytes" else w.shape[-1] // 2
    signed = grid.element.kind == "integer" and grid.symmetric and layout == "bytes"
    codes = new((*w.shape[:-1], width), dtype=torch.int8 if signed else torch.uint8)
    scales = new(shape, dtype=torch.float32 if grid.element.kind == "integer" else torch.uint8)
    zeros = None if grid.symmetric else new(shape, dtype=torch.uint8)
    peak = _peak(w, grid)
    _one(
        w.detach(), grid, peak=peak, values=values, steps=steps, codes=codes, scales=scales, zeros=zeros, layout=layout
    )
    power = None if peak is None else ops.tensor_power(peak.view(torch.float32)).reshape(())
    return {"codes": codes, "scales": scales, "zeros": zeros, "tensor_scale": power}


def decodes(q: QTensor[Tensor]) -> bool:
    """Whether `dequantize` takes `q`: a code a byte, and a scale for each row."""
    return q.grid.symmetric and q.grid.group == "row" and q.codes.is_contiguous() and q.codes.data_ptr() % ALIGNED == 0


def dequantize(q: QTensor[Tensor]) -> Tensor:
    """`ops.dequantize(q)`, for what it `decodes`."""
    values = torch.empty(q.codes.shape, dtype=ops.DTYPE[q.dtype], device=q.codes.device)
    geometry = tiles(q.codes, q.grid)
    passes.decode[(_count(q.codes, q.grid),)](
        q.codes, q.scales, values, GRID=constants(q.grid), INTERPRETED=INTERPRETED, **geometry
    )
    return values


def make_values(weights: list[Tensor], made: list[Tensor], gates: list[Tensor], grid: Grid) -> None:
    """Fills each of `made` with the values of its weight, in one launch (nvfp4: two, for it looks at whole tensors first).

    Args:
        weights: what the kernels take on `grid`, of one type and one length of rows if groups are rows.
        made: of the shapes of `weights`, in one type.
        gates: bool []; where one is off, the weight itself is copied.
    """
    peaks = _zeros(len(weights), weights[0].device) if _looks_first(grid) else None
    rows = tuple(
        (offset(w, weights[0]), offset(target, made[0]), gate.data_ptr(), 0 if peaks is None else peaks[i].data_ptr())
        for i, (w, target, gate) in enumerate(zip(weights, made, gates, strict=True))
    )
    geometry = tiles(weights[0], grid)
    counts = tuple(_count(w, grid) for w in weights)
    blocks, full = programs(rows, counts, (1, 1, 0, 0), geometry, weights[0].device)
    if peaks is not None:
        passes.peaks_of_many[(len(blocks),)](weights[0], blocks, FULL=full, **geometry)
    passes.values_of_many[(len(blocks),)](
        weights[0], made[0], blocks, GRID=constants(grid), FULL=full, INTERPRETED=INTERPRETED, **geometry
    )


@cache
def constants(grid: Grid) -> tuple[Any, ...]:
    """What the kernels must know of `grid`, as they want it: see `kernels.quantized`."""
    element = grid.element
    low, high = (0, element.levels) if not grid.symmetric else (element.lowest, element.highest)
    return (
        grid.scale,
        STEP.get((element.name, grid.scale), 0.0),
        float(low),
        element.largest if element.kind == "float" else float(high),
        element.mantissa,
        element.min_exponent,
        element.max_exponent,
        elements.MIN_SCALE,
        elements.MIN_SCALE_CODE,
        elements.MAX_SCALE_CODE,
        elements.NVFP4_STEP,
        elements.MIN_BLOCK_SCALE,
        element.bits,
    )


def tiles(w: Tensor, grid: Grid) -> dict[str, int]:
    """The tile of a program: how many groups, their length, and the power of two that holds it, or a part of it; and warps."""
    group = _group(w, grid)
    width = min(triton.next_power_of_2(group), LONGEST)
    groups = max(1, TILE // width)
    warps = groups * width // WARP
    if group > LONGEST and grid.scale not in ("signed", "minmax"):  # one extreme to hold: more warps are faster
        warps *= 2
    return {"GROUPS": groups, "GROUP": group, "WIDTH": width, "num_warps": warps}


def offset(tensor: Tensor, base: Tensor) -> int:
    """Where `tensor` is, in elements from `base` on, which has its type."""
    return (tensor.data_ptr() - base.data_ptr()) // base.element_size()


def programs(
    rows: tuple[tuple[int, ...], ...],
    counts: tuple[int, ...],
    moves: tuple[int, ...],
    geometry: dict[str, int],
    device: torch.device,
) -> tuple[Tensor, bool]:
    """One row for each program of a launch over many tensors, int64 on the device, and whether each has a full tile.

    Args:
        rows: of each tensor: places and addresses.
        counts: of each tensor: how many groups. Rows end with how many are left from the program's first on.
        moves: of each column, whether it moves on with the elements.

    They are kept, since the same are likely to be asked for again; but not those made while a graph is captured, for their
    memory is the graph's.
    """
    groups, group = geometry["GROUPS"], geometry["GROUP"]
    full = geometry["WIDTH"] == group and all(count % groups == 0 for count in counts)
    key = (rows, counts, groups, group, device)
    made = _programs.get(key)
    if made is None:
        number = [-(-count // groups) for count in counts]
        first = np.concatenate([np.arange(n, dtype=np.int64) for n in number]) * groups
        table = np.repeat(np.array(rows, np.int64), number, axis=0)
        table += (first * group)[:, None] * np.array(moves)
        left = np.repeat(np.array(counts, np.int64), number) - first
        made = _on(np.concatenate([table, left[:, None]], axis=1), device)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            if len(_programs) >= KEPT:
                _programs.pop(next(iter(_programs)))
            _programs[key] = made
    return made, full


KEPT = 64  #: how many tables of programs are kept
_programs: dict[Any, Tensor] = {}
_peaks: dict[Any, Tensor] = {}
_captured: list[Tensor] = []  #: host memory that captured graphs copy from at every replay


def _on(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.from_numpy(array)
    pinned = torch.from_numpy(array).pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def _one(
    w: Tensor,
    grid: Grid,
    *,
    peak: Tensor | None,
    values: Tensor | None = None,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    steps: Tensor | None = None,
    gate: Tensor | None = None,
    layout: str = "",
) -> None:
    geometry, count = tiles(w, grid), _count(w, grid)
    full = geometry["WIDTH"] == geometry["GROUP"] and count % geometry["GROUPS"] == 0
    passes.one[(-(-count // geometry["GROUPS"]),)](
        w, values, codes, scales, zeros, steps, gate if gate is None else gate.view(torch.uint8), peak, count,
        GRID=constants(grid), CODES=layout, FULL=full, INTERPRETED=INTERPRETED, **geometry,
    )  # fmt: skip


def _peak(w: Tensor, grid: Grid) -> Tensor | None:
    """The bits of the largest magnitude of `w`, where `grid` looks at it first."""
    if not _looks_first(grid):
        return None
    peak = _zeros(1, w.device)
    geometry = tiles(w, grid)
    rows, counts = ((0, 0, 0, peak.data_ptr()),), (_count(w, grid),)
    blocks, full = programs(rows, counts, (1, 0, 0, 0), geometry, w.device)
    passes.peaks_of_many[(len(blocks),)](w, blocks, FULL=full, **geometry)
    return peak


def _zeros(count: int, device: torch.device) -> Tensor:
    """`count` peaks to begin with, always at the same place, so that tables that hold it can be kept."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (count, device, stream) in _peaks:
        return _peaks[count, device, stream].zero_()
    made = torch.zeros(count, dtype=torch.int32, device=device)
    if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        _peaks[count, device, stream] = made
    return made


def _looks_first(grid: Grid) -> bool:
    return grid.scale == "nvfp4"


def _group(w: Tensor, grid: Grid) -> int:
    return w.shape[-1] if grid.group == "row" else int(grid.group)


def _count(w: Tensor, grid: Grid) -> int:
    return w.numel() // _group(w, grid)
