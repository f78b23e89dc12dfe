"""Launches of one step of AdamW over many weights, which writes their quantized values too. CUDA only."""

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkit_torchao.kernels import triton_adamw
from qkit_torchao.kernels.cuda import INTERPRETED, device_of, takes
from qkit_torchao.kernels.plans import TILE, constants, tiles
from qkit_torchao.kernels.tables import Target, offsets, on_device, programs

Member = tuple[Tensor, Tensor, dict[str, Tensor], Target | None]  #: a weight, its gradient, its state, and a target
FLAT = 1024  #: elements of a weight that is not quantized that make a row of a tile, or a power of two below


def step(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
    targets: list[Target | None],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Steps `weights`, which have one counter of steps, by their `gradients`, and their `states`, as torch's AdamW does.

    Where there is a target, it gets the values of the stepped weight.
    """
    scalars = torch.empty(6, dtype=torch.float32, device=weights[0].device)
    with device_of(scalars):
        triton_adamw.adamw_scalars[(1,)](
            states[0]["step"], lr, scalars, 1 - betas[0], 1 - betas[1], math.log2(betas[0]) if betas[0] else -1e4,
            math.log2(betas[1]) if betas[1] else -1e4, eps, weight_decay, FLOAT=not isinstance(lr, Tensor),
        )  # fmt: skip
    kinds: dict[Any, list[Member]] = defaultdict(list)
    for member in zip(weights, gradients, states, targets, strict=True):
        kinds[_kind(*member)].append(member)
    for members in kinds.values():
        _launch(members, scalars)
    torch.autograd.graph.increment_version([*weights, *(target.values for target in targets if target)])


def writes(weight: Tensor, target: Target) -> bool:
    """Whether a step can write the values to `target`. Grids that look at more than a program sees are written later."""
    group = weight.shape[-1] if target.grid.group == "row" else target.grid.group
    fits = target.grid.by_rows and int(group) <= TILE and target.values.is_contiguous()
    return fits and takes(weight.detach(), target.grid)


def _kind(weight: Tensor, gradient: Tensor, state: dict[str, Tensor], target: Target | None) -> tuple[Any, ...]:
    """All that must be equal for one launch to step two weights."""
    types = (weight.dtype, gradient.dtype, state["exp_avg"].dtype)
    return (*types, target.grid, target.values.dtype, weight.shape[-1]) if target else (*types, _flat(weight))


def _flat(weight: Tensor) -> int:
    return math.gcd(weight.numel(), FLAT)


def _launch(members: list[Member], scalars: Tensor) -> None:
    weight, _, state, target = members[0]
    if target:
        geometry = tiles(weight, target.grid)
    else:
        group = _flat(weight)
        geometry = {"GROUPS": 4 * FLAT // group, "GROUP": group, "WIDTH": group, "num_warps": 4}
    weights, given, states, targets = zip(*members, strict=True)
    gradients = [gradient.contiguous() for gradient in given]
    moments = [[s[name] for s in states] for name in ("exp_avg", "exp_avg_sq")]
    values = [one.values for one in targets] if target else []
    columns = [offsets(tensors) for tensors in (weights, gradients, *moments)]
    columns += [offsets(values), [one.gate.data_ptr() for one in targets]] if target else [[0] * len(members)] * 2
    counts = tuple(w.numel() // geometry["GROUP"] for w in weights)
    numbers = tuple((number, 0) for number in range(len(members)))
    blocks, full = programs(numbers, counts, (0, 1), geometry, weight.device)  # the same at every step
    rows = tuple(zip(*columns, strict=True))  # gradients may be elsewhere at every step
    table = on_device(rows, lambda: np.array(rows, np.int64), weight.device)
    with device_of(weight):
        triton_adamw.adamw_of_many[(len(blocks),)](
            weight, gradients[0], state["exp_avg"], state["exp_avg_sq"], values[0] if values else None, table, blocks,
            scalars, GRID=constants(target.grid) if target else None, FULL=full, INTERPRETED=INTERPRETED, **geometry,
        )  # fmt: skip
