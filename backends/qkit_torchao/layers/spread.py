"""Weights that are spread over processes: the values and codes of a part, as those of the whole weight. No cache, no autograd.

A scale depends on its group by the largest and the smallest number only. Where a group lies in several processes, each adds the
two numbers of the whole group to its own part, and takes them off the result.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, distributed

from qkit.errors import GridError
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit_torchao.arithmetic import rounding
from qkit_torchao.kernels import choose


def want_groups_whole(local: Tensor, outer: Any, grid: Grid) -> None:
    """Refuses a part of `outer` that ends within a group.

    Raises:
        GridError: the message says how wide the part is.
    """
    if splits_groups(local, outer, grid):
        raise GridError(
            f"a plan splits groups of {grid.group}: a weight {list(outer.shape)} is spread over processes along its inputs, "
            f"{local.shape[-1]} in each; spread it along its outputs, over fewer processes, or use smaller groups"
        )


def splits_groups(local: Tensor, outer: Any, grid: Grid) -> bool:
    """Whether `local`, a part of `outer`, ends within a group."""
    return isinstance(grid.group, int) and bool(meshes(outer, along=True)) and bool(local.shape[-1] % grid.group)


def depends_on_others(outer: Any, grid: Grid) -> bool:
    """Whether scales of a part of `outer` depend on parts in other processes."""
    return bool(_reduced_over(outer, grid))


def values(local: Tensor, outer: Any, grid: Grid, *, partners: Sequence[tuple[Tensor, Any]] = ()) -> Tensor:
    """The values of `local`, the part of `outer` in this process, in its type. Each process of `outer` has to call this.

    Args:
        partners: parts and wholes of the other weights that share the tensor scale.
    """
    if not depends_on_others(outer, grid):
        return choose.rounded(local, grid) if local.numel() else local.clone()
    completed, peak = _completed(local, outer, grid, partners)
    return _cut(choose.rounded(completed, grid, peak=peak), local)


def unclipped(local: Tensor, outer: Any, grid: Grid, *, partners: Sequence[tuple[Tensor, Any]] = ()) -> Tensor:
    """Where numbers of `local` round to a code without being clipped; see `values`."""
    if not depends_on_others(outer, grid):
        return rounding.unclipped(local, grid) if local.numel() else local.to(torch.bool)
    completed, peak = _completed(local, outer, grid, partners)
    return _cut(rounding.unclipped(completed, grid, peak=peak), local)


def quantize(
    local: Tensor, outer: Any, grid: Grid, *, partners: Sequence[tuple[Tensor, Any]] = ()
) -> QTensor[Tensor] | None:
    """Codes and scales of `local`, None where it is empty; see `values`."""
    if not depends_on_others(outer, grid):
        return choose.quantize(local, grid) if local.numel() else None
    completed, peak = _completed(local, outer, grid, partners)
    if not local.numel():
        return None
    q = choose.quantize(completed, grid, peak=peak)
    return replace(q, codes=_cut(q.codes, local))


def reduce_extremes(low: Tensor, high: Tensor, groups: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The lowest and the highest numbers over processes; infinite where one is NaN, which no reduction promises to pass on."""
    both = torch.stack([-low, high]).to(torch.float32).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    for group in groups:
        distributed.all_reduce(both, op=distributed.ReduceOp.MAX, group=group)
    return -both[0], both[1]


def meshes(outer: Any, *, along: bool) -> list[Any]:
    """The groups of processes that share `outer`: if `along`, those only between which the last axis is split."""
    last = outer.dim() - 1
    return [
        outer.device_mesh.get_group(number)
        for number, placement in enumerate(outer.placements)
        if hasattr(placement, "dim") and (not along or placement.dim == last) and outer.device_mesh.size(number) > 1
    ]


def _completed(
    local: Tensor, outer: Any, grid: Grid, partners: Sequence[tuple[Tensor, Any]]
) -> tuple[Tensor, Tensor | None]:
    """`local` with the extremes of its groups, as `grid` groups them; or `local` and the peak that all parts share."""
    groups = _reduced_over(outer, grid)
    if grid.has_tensor_scale:
        peaks = [_peak(part, _reduced_over(whole, grid)) for part, whole in ((local, outer), *partners)]
        return local, torch.stack(peaks).amax()
    rows = local if grid.group == "row" else local.reshape(1, -1)
    if rows.numel():
        low, high = rows.amin(dim=-1), rows.amax(dim=-1)
    else:
        low, high = (torch.full((len(rows),), end, device=local.device) for end in (torch.inf, -torch.inf))
    ends = torch.stack(reduce_extremes(low, high, groups), dim=-1).to(local.dtype)
    return torch.cat([rows, ends], dim=-1), None


def _peak(local: Tensor, groups: Sequence[Any]) -> Tensor:
    peak = (local.abs().amax() if local.numel() else local.new_zeros(())).to(torch.float32)
    return reduce_extremes(peak, peak, groups)[1]


def _cut(completed: Tensor, local: Tensor) -> Tensor:
    """A result for `_completed`, without the extremes: shaped as `local`."""
    if completed.shape == local.shape:
        return completed
    rows = completed[..., : completed.shape[-1] - 2]
    return rows.reshape(local.shape)


def _reduced_over(outer: Any, grid: Grid) -> list[Any]:
    """The groups of processes over which the parts of one scale of `outer` lie."""
    if grid.group == "tensor" or grid.has_tensor_scale:
        return meshes(outer, along=False)
    return meshes(outer, along=True) if grid.group == "row" else []


def agree(text: str, device: torch.device, groups: Sequence[Any]) -> bool:
    """Whether all processes of `groups` have the same `text`; each of them has to call this."""
    number = torch.tensor([1, -1], device=device) * crc32(text.encode())
    both = number.clone()
    for group in groups:
        distributed.all_reduce(both, op=distributed.ReduceOp.MAX, group=group)
    return torch.equal(both, number)


def rule_text(rule: Any) -> str:
    """A rule in words."""
    return f"{rule.weight} @ {rule.activation} -> {rule.output}, {rule.ste}, {rule.range}"
