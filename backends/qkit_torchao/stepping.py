"""A step of AdamW in Triton, over many weights at once, with the quantized values of what it stepped. CUDA only."""

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from qkit_torchao.kernels import extremes, load, narrow, place, steps, tile, units
from qkit_torchao.launch import INTERPRETED, TILE, constants, offset, on_device, programs, takes, tiles
from qkit_torchao.values import Entry

FLAT = 1024  #: elements of a weight that is not quantized that make a row of a tile, or a power of two below


def step(
    weights: list[Tensor],
    states: list[dict[str, Tensor]],
    entries: list[Entry | None],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Steps `weights`, which have gradients and one counter of steps, and their `states`, as torch's AdamW does.

    Where there is an entry, its values are made of the stepped weight.
    """
    scalars = torch.empty(6, dtype=torch.float32, device=weights[0].device)
    adamw_scalars[(1,)](
        states[0]["step"], lr, scalars, 1 - betas[0], 1 - betas[1], math.log2(betas[0]) if betas[0] else -1e4,
        math.log2(betas[1]) if betas[1] else -1e4, eps, weight_decay, FLOAT=not isinstance(lr, Tensor),
    )  # fmt: skip
    kinds: dict[Any, list[tuple[Tensor, dict[str, Tensor], Entry | None]]] = defaultdict(list)
    for weight, state, entry in zip(weights, states, entries, strict=True):
        kinds[_kind(weight, state, entry)].append((weight, state, entry))
    for members in kinds.values():
        _launch(members, scalars)
    written = [entry.made for entry in entries if entry and entry.made is not None]
    torch.autograd.graph.increment_version([*weights, *written])


def _kind(weight: Tensor, state: dict[str, Tensor], entry: Entry | None) -> tuple[Any, ...]:
    """What must be equal for two weights to be stepped by one launch."""
    assert weight.grad is not None
    types = (weight.dtype, weight.grad.dtype, state["exp_avg"].dtype)
    return (*types, entry.grid, entry.dtype, weight.shape[-1]) if entry else (*types, _flat(weight))


def _flat(weight: Tensor) -> int:
    return math.gcd(weight.numel(), FLAT)


def _launch(members: list[tuple[Tensor, dict[str, Tensor], Entry | None]], scalars: Tensor) -> None:
    weight, state, entry = members[0]
    if entry:
        geometry = tiles(weight, entry.grid)
    else:
        group = _flat(weight)
        geometry = {"GROUPS": 4 * FLAT // group, "GROUP": group, "WIDTH": group, "num_warps": 4}
    gradients = [_gradient(w) for w, _, _ in members]
    first = entry.made if entry else None
    rows = tuple(
        (
            offset(w, weight),
            offset(gradient, gradients[0]),
            offset(s["exp_avg"], state["exp_avg"]),
            offset(s["exp_avg_sq"], state["exp_avg_sq"]),
            offset(e.made, first) if e and e.made is not None and first is not None else 0,
            e.gate.data_ptr() if e else 0,
        )
        for (w, s, e), gradient in zip(members, gradients, strict=True)
    )
    counts = tuple(w.numel() // geometry["GROUP"] for w, _, _ in members)
    numbers = tuple((number, 0) for number in range(len(members)))
    blocks, full = programs(numbers, counts, (0, 1), geometry, weight.device)  # the same at every step
    table = on_device(np.array(rows, np.int64), weight.device)  # gradients are elsewhere at every step
    adamw_of_many[(len(blocks),)](
        weight, gradients[0], state["exp_avg"], state["exp_avg_sq"], first, table, blocks, scalars,
        GRID=constants(entry.grid) if entry else None, FULL=full, INTERPRETED=INTERPRETED, **geometry,
    )  # fmt: skip


def _gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad if weight.grad.is_contiguous() else weight.grad.contiguous()


def writes(entry: Entry, weight: Tensor) -> bool:
    """Whether a step can write the values of `entry`: those on grids that look at more than a program sees are made later."""
    group = weight.shape[-1] if entry.grid.group == "row" else entry.grid.group
    fits = entry.grid.by_rows and int(group) <= TILE and entry.made is not None and entry.made.is_contiguous()
    return fits and takes(weight.detach(), entry.grid)


@triton.jit
def adamw_of_many(
    weights, gradients, means, squares, targets, table, blocks, scalars, GRID: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A step of AdamW for many weights in one launch, and the quantized values of the stepped weights, if there is a `GRID`.

    Arithmetic is in float32 and rounded once to the type of the weight, which is what is then quantized. `table` int64
    [tensors, 6]: where weight, gradient, both moments and target are, in elements from the first of each on; the address of
    the gate. `blocks` int64 [programs, 3]: a tensor, the first element of the program's part, how many groups are left.
    `scalars` float32 [6]: see `adamw_scalars`.
    """
    SOURCE: tl.constexpr = weights.dtype.element_ty
    MOMENT: tl.constexpr = means.dtype.element_ty
    block = blocks + 3 * tl.program_id(0)
    row = table + 6 * tl.load(block)
    start = (tl.load(block + 1) >> 3) << 3
    weight = place(weights, row, 0, SOURCE) + start
    gradient = place(gradients, row, 1, gradients.dtype.element_ty) + start
    mean = place(means, row, 2, MOMENT) + start
    square = place(squares, row, 3, MOMENT) + start
    offsets, mask = tile(tl.load(block + 2), GROUPS, GROUP, WIDTH, FULL)
    w = load(weight + offsets, mask)
    g = load(gradient + offsets, mask)
    m = load(mean + offsets, mask)
    v = load(square + offsets, mask)
    m += tl.load(scalars) * (g - m)
    v += tl.load(scalars + 1) * (g * g - v)
    root = tl.sqrt(v) * tl.load(scalars + 4) + tl.load(scalars + 5)
    stepped = narrow(w * tl.load(scalars + 2) - tl.load(scalars + 3) * m / root, SOURCE, INTERPRETED)
    tl.store(weight + offsets, stepped, mask=mask)
    tl.store(mean + offsets, narrow(m, MOMENT, INTERPRETED), mask=mask)
    tl.store(square + offsets, narrow(v, MOMENT, INTERPRETED), mask=mask)
    if GRID is not None:
        TARGET: tl.constexpr = targets.dtype.element_ty
        target = place(targets, row, 4, TARGET) + start
        x = stepped.to(tl.float32)
        if tl.load(tl.load(row + 5).to(tl.pointer_type(tl.uint8))) != 0:
            high, low = extremes(x, GRID, INTERPRETED)
            s, reciprocal, z, _ = steps(high, low, 0, GRID, INTERPRETED)
            x = units(x, s, reciprocal, z, GRID, INTERPRETED) * s[:, None]
        tl.store(target + offsets, narrow(x, TARGET, INTERPRETED), mask=mask)


@triton.jit
def adamw_scalars(
    step, rate, scalars, complement1, complement2, log1, log2, eps, decay, FLOAT: tl.constexpr
):  # fmt: skip
    """Counts a step, and writes what `adamw_of_many` multiplies with, float32 [6].

    They are 1 - beta1, 1 - beta2, 1 - rate * decay, rate / (1 - beta1^step), 1 / sqrt(1 - beta2^step) and eps.
    `rate` is a number or the address of one; logarithms of the betas are to base 2.
    """
    count = tl.load(step) + 1.0
    tl.store(step, count)
    lr = tl.full((), rate if FLOAT else tl.load(rate), tl.float64)
    correction1 = 1.0 - tl.exp2(count.to(tl.float64) * log1)
    correction2 = 1.0 - tl.exp2(count.to(tl.float64) * log2)
    tl.store(scalars, complement1)
    tl.store(scalars + 1, complement2)
    tl.store(scalars + 2, (1.0 - lr * decay).to(tl.float32))
    tl.store(scalars + 3, (lr / correction1).to(tl.float32))
    tl.store(scalars + 4, (1.0 / tl.sqrt(correction2)).to(tl.float32))
    tl.store(scalars + 5, eps)
