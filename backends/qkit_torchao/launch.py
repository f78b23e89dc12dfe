"""Launching the Triton kernels: which tensors they take, in what tiles, many weights at once. Imported on CUDA machines only."""

from functools import cache, partial
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from qkit import element as elements
from qkit.element import STEP
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit_torchao import ops
from qkit_torchao.kernels import bits, floats, narrow, place, quantized, small_code, small_value, tile

TILE = 4096  #: elements that a program works on, where groups are shorter
WIDEST = 32768  #: longest group that fits into one program
WARP = 1024  #: elements of a tile for each warp
TYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def values_of_many(
    sources, targets, table, blocks, GRID: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The quantized values of many weights in one launch; of those whose gate is off, the weights themselves.

    `table` int64 [tensors, 5]: where source and target are, in elements from `sources` and `targets` on; addresses of gate (a
    byte) and peak (its bits, for nvfp4); how many groups. `blocks` int32 [programs, 2]: a tensor and its first group.
    """
    block = blocks + 2 * tl.program_id(0)
    row = table + 5 * tl.load(block)
    first = tl.load(block + 1)
    source = place(sources, row, sources.dtype.element_ty)
    target = place(targets, row + 1, targets.dtype.element_ty)
    on = tl.load(tl.load(row + 2).to(tl.pointer_type(tl.uint8))) != 0
    peak = 0
    if GRID[0] == "nvfp4":
        peak = tl.load(tl.load(row + 3).to(tl.pointer_type(tl.int32)))
    offsets, mask = tile(first, tl.load(row + 4).to(tl.int32), GROUPS, GROUP, WIDTH)
    start = first.to(tl.int64) * GROUP
    x = tl.load(source + start + offsets, mask=mask, other=0.0).to(tl.float32)
    y, s, _, _ = quantized(x, peak, GRID, INTERPRETED)
    tl.store(
        target + start + offsets,
        narrow(tl.where(on, y * s[:, None], x), targets.dtype.element_ty, INTERPRETED),
        mask=mask,
    )


@triton.jit
def peaks_of_many(
    sources, table, blocks, GROUPS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Raises each tensor's peak to the bits of its largest magnitude. `table` and `blocks` as for `values_of_many`."""
    block = blocks + 2 * tl.program_id(0)
    row = table + 5 * tl.load(block)
    first = tl.load(block + 1)
    source = place(sources, row, sources.dtype.element_ty)
    offsets, mask = tile(first, tl.load(row + 4).to(tl.int32), GROUPS, GROUP, WIDTH)
    x = tl.load(source + first.to(tl.int64) * GROUP + offsets, mask=mask, other=0.0).to(tl.float32)
    most = tl.max(tl.max(bits(x) & 0x7FFFFFFF, axis=1), axis=0)
    tl.atomic_max(tl.load(row + 3).to(tl.pointer_type(tl.int32)), most)


@triton.jit
def one(
    source, values, codes, scales, zeros, steps, peak, count, GRID: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, CODES: tl.constexpr, VALUES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tensor of `count` groups: its values if `VALUES`, and its codes and scales, if `CODES` is not empty.

    `CODES`: `bytes`, one code each; `pairs`, two four-bit codes to a byte, the first low; `tiles`, codes + 8, the first high.
    `peak` holds the bits of the largest magnitude of the tensor, for nvfp4.
    """
    first = tl.program_id(0) * GROUPS
    offsets, mask = tile(first, count, GROUPS, GROUP, WIDTH)
    start = first.to(tl.int64) * GROUP
    x = tl.load(source + start + offsets, mask=mask, other=0.0).to(tl.float32)
    tensor_peak = 0
    if GRID[0] == "nvfp4":
        tensor_peak = tl.load(peak)
    y, s, stored, z = quantized(x, tensor_peak, GRID, INTERPRETED)
    if VALUES:
        tl.store(values + start + offsets, narrow(y * s[:, None], values.dtype.element_ty, INTERPRETED), mask=mask)
    if steps is not None:
        tl.store(steps + first + tl.arange(0, GROUPS), s, mask=first + tl.arange(0, GROUPS) < count)
    if CODES != "":
        groups = first + tl.arange(0, GROUPS)
        if GRID[4] > 0:
            c = small_code(y, GRID[4], GRID[5], GRID[12])
        elif GRID[0] == "minmax":
            c = (y + z[:, None]).to(tl.int32)
            tl.store(zeros + groups, z.to(tl.uint8), mask=groups < count)
        else:
            c = y.to(tl.int32)
        if GRID[0] == "nvfp4":
            tl.store(scales + groups, small_code(stored, 3, -6, 8).to(tl.uint8), mask=groups < count)
        else:
            tl.store(scales + groups, stored.to(scales.dtype.element_ty), mask=groups < count)
        if CODES == "bytes":
            tl.store(codes + start + offsets, c.to(codes.dtype.element_ty), mask=mask)
        else:
            even, odd = tl.split(c.reshape(GROUPS, WIDTH // 2, 2))
            if CODES == "pairs":
                pairs = even & 15 | (odd & 15) << 4
            else:
                pairs = (even + 8) << 4 | odd + 8
            halves, inside = tile(first, count, GROUPS, GROUP // 2, WIDTH // 2)
            tl.store(codes + start // 2 + halves, pairs.to(tl.uint8), mask=inside)


@triton.jit
def decode(
    codes, scales, values, count, GRID: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """What codes, a byte each, and the scales of their `count` groups mean."""
    first = tl.program_id(0) * GROUPS
    offsets, mask = tile(first, count, GROUPS, GROUP, WIDTH)
    start = first.to(tl.int64) * GROUP
    groups = first + tl.arange(0, GROUPS)
    c = tl.load(codes + start + offsets, mask=mask, other=0).to(tl.int32)
    s = tl.load(scales + groups, mask=groups < count, other=0)
    if GRID[4] > 0:
        x = small_value(c, GRID[4], GRID[5], GRID[12])
        s = floats(s.to(tl.int32) << 23)
    else:
        x = c.to(tl.float32)
    tl.store(values + start + offsets, narrow(x * s[:, None], values.dtype.element_ty, INTERPRETED), mask=mask)


def takes(w: Tensor, grid: Grid, *, bytes_too: bool = False) -> bool:
    """Whether the kernels take `w` on `grid`; else `ops` does. `bytes_too`: whether `w` may be codes."""
    fits = (
        (w.dtype in TYPES or (bytes_too and w.dtype == torch.uint8))
        and w.is_contiguous()
        and w.data_ptr() % 16 == 0
        and w.numel() > 0
    )
    return fits and grid.group != "tensor" and _group(w, grid) <= WIDEST


def values(w: Tensor, grid: Grid) -> Tensor:
    """`ops.rounded(w, grid)`, for what `takes`."""
    made = torch.empty_like(w)
    _one(w, grid, peak=_peak(w, grid), values=made)
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
    """Whether `dequantize` takes `q`: codes of symmetric integers and small floats, with scales of their own groups."""
    return q.grid.symmetric and q.tensor_scale is None and takes(q.codes.view(torch.uint8), q.grid, bytes_too=True)


def dequantize(q: QTensor[Tensor]) -> Tensor:
    """`ops.dequantize(q)`, for what it `decodes`."""
    values = torch.empty(q.codes.shape, dtype=ops.DTYPE[q.dtype], device=q.codes.device)
    geometry, count = tiles(q.codes, q.grid), _count(q.codes, q.grid)
    decode[(-(-count // geometry["GROUPS"]),)](
        q.codes, q.scales, values, count, GRID=constants(q.grid), INTERPRETED=INTERPRETED, **geometry
    )
    return values


def make_values(weights: list[Tensor], made: list[Tensor], gates: list[Tensor], grid: Grid) -> None:
    """Fills each of `made` with the values of its weight, in one launch (nvfp4: two, for it looks at whole tensors first).

    Args:
        weights: what the kernels take on `grid`, of one type and one length of rows if groups are rows.
        made: of the shapes of `weights`, in one type.
        gates: bool []; where one is off, the weight itself is copied.
    """
    peaks = torch.zeros(len(weights), dtype=torch.int32, device=weights[0].device) if _looks_first(grid) else None
    rows = tuple(
        (
            offset(w, weights[0]),
            offset(target, made[0]),
            gate.data_ptr(),
            0 if peaks is None else peaks[i].data_ptr(),
            _count(w, grid),
        )
        for i, (w, target, gate) in enumerate(zip(weights, made, gates, strict=True))
    )
    geometry = tiles(weights[0], grid)
    table, blocks = tables(rows, geometry["GROUPS"], weights[0].device, keep=peaks is None)
    if peaks is not None:
        peaks_of_many[(len(blocks),)](weights[0], table, blocks, **geometry)
    values_of_many[(len(blocks),)](
        weights[0], made[0], table, blocks, GRID=constants(grid), INTERPRETED=INTERPRETED, **geometry
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
    """The tile of a program: how many groups, their length, and the power of two that holds it; and how many warps."""
    group = _group(w, grid)
    width = triton.next_power_of_2(group)
    groups = max(1, TILE // width)
    return {"GROUPS": groups, "GROUP": group, "WIDTH": width, "num_warps": min(max(groups * width // WARP, 4), 32)}


def offset(tensor: Tensor, base: Tensor) -> int:
    """Where `tensor` is, in elements from `base` on, which has its type."""
    return (tensor.data_ptr() - base.data_ptr()) // base.element_size()


def tables(
    rows: tuple[tuple[int, ...], ...], groups: int, device: torch.device, *, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """`rows`, whose last column counts groups, and the blocks of `groups` groups that they come to, on the device.

    They are kept where the same are likely to be asked for again; never those made while a graph is captured, whose memory is
    the graph's.
    """
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    known = _tables.get((rows, groups)) if keep else None
    if known is None:
        counts = [-(-row[-1] // groups) for row in rows]
        number = np.repeat(np.arange(len(rows)), counts)
        first = np.concatenate([np.arange(count) for count in counts]) * groups
        blocks = np.stack([number, first], axis=1).astype(np.int32)
        known = _on(np.array(rows, np.int64), device), _on(blocks, device)
        if keep and not capturing:
            if len(_tables) >= KEPT:
                _tables.pop(next(iter(_tables)))
            _tables[rows, groups] = known
    return known


KEPT = 64  #: how many tables are kept
_tables: dict[Any, tuple[Tensor, Tensor]] = {}
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
    layout: str = "",
) -> None:
    geometry, count = tiles(w, grid), _count(w, grid)
    one[(-(-count // geometry["GROUPS"]),)](
        w, values, codes, scales, zeros, steps, peak, count,
        GRID=constants(grid), CODES=layout, VALUES=values is not None, INTERPRETED=INTERPRETED, **geometry,
    )  # fmt: skip


def _peak(w: Tensor, grid: Grid) -> Tensor | None:
    """The bits of the largest magnitude of `w`, where `grid` looks at it first."""
    if not _looks_first(grid):
        return None
    peak = torch.zeros(1, dtype=torch.int32, device=w.device)
    geometry = tiles(w, grid)
    rows = ((0, 0, 0, peak.data_ptr(), _count(w, grid)),)
    table, blocks = tables(rows, geometry["GROUPS"], w.device, keep=False)
    peaks_of_many[(len(blocks),)](w, table, blocks, **geometry)
    return peak


def _looks_first(grid: Grid) -> bool:
    return grid.scale == "nvfp4"


def _group(w: Tensor, grid: Grid) -> int:
    return w.shape[-1] if grid.group == "row" else int(grid.group)


def _count(w: Tensor, grid: Grid) -> int:
    return w.numel() // _group(w, grid)
