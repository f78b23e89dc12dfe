"""Layers whose weight is a DTensor while they compute, as in tensor parallelism: each process quantizes its part. Eager."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from qkit.grid import Grid
from qkit_torchao.arithmetic import ranges, rounding
from qkit_torchao.arithmetic.scale_rules import amax, poison
from qkit_torchao.cache.shard import Shard, become_shard
from qkit_torchao.layers import shard_first, spread
from qkit_torchao.layers.straight_through import masked
from qkit_torchao.torch_private import local_part


@torch.compiler.disable  # type: ignore[untyped-decorator]
def weight_values(layer: Any, dtype: torch.dtype) -> Tensor:
    """The values of the weight of `layer` in `dtype`, a DTensor as the weight is; the gradient passes straight through.

    Raises:
        GridError: the plan splits groups.
    """
    weight = layer.weight
    part = local_part(weight)
    spread.want_groups_whole(part, weight, layer.weight_grid)
    if not isinstance(part, Shard) or part.source.outer() is not weight:  # type: ignore[attr-defined]
        become_shard(part, shard_first.LayerSource([layer], weight))
    values: Tensor = _Weight.apply(weight, layer, dtype)  # type: ignore[no-untyped-call]
    return values


class _Weight(torch.autograd.Function):
    """Forward: the values, from the cache of the part. Backward: the gradient, zero where the weight was clipped if masked."""

    @staticmethod
    def forward(ctx: Any, weight: Any, layer: Any, dtype: torch.dtype) -> Tensor:
        part: Any = local_part(weight)
        source: shard_first.LayerSource = part.source
        ctx.source, ctx.weight, ctx.placements, ctx.dtype = source, weight, weight.placements, weight.dtype
        values = source.values(part, len(part), dtype)[0]
        return _like(values if layer.training and layer.caches else values.clone(), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        gradient = gradients[0]
        if gradient.placements != ctx.placements:
            gradient = gradient.redistribute(placements=ctx.placements)
        gradient = gradient.to(ctx.dtype)
        inside = ctx.source.unclipped(ctx.weight)
        if inside is not None:
            gradient = _like(masked(gradient.to_local(), inside), gradient)
        return gradient, None, None


def on_grid(layer: Any, x: Any, name: str, grid: Grid) -> Tensor:
    """The DTensor `x` [..., n] on the grid of the slot `name` of `layer`, `input` or `output`; straight through.

    Raises:
        GridError: `x` is spread along its last axis, and its parts split groups.
    """
    if any(isinstance(placement, Partial) for placement in x.placements):
        x = x.redistribute(placements=[Replicate() if isinstance(one, Partial) else one for one in x.placements])
    spread.want_groups_whole(x.to_local(), x, grid)
    if layer.rule.range == "dynamic":
        return _OnGrid.apply(x, grid, layer.rule.ste, {})  # type: ignore[no-any-return, no-untyped-call]
    with torch.no_grad():
        seen = layer.get_buffer(f"{name}_range")
        low, high = torch.aminmax(x.to_local())
        found = torch.stack(spread.reduce_extremes(low, high, spread.meshes(x, along=False)))
        if layer.calibrating:
            seen.copy_(ranges.wider(seen, found))
        elif layer.training and layer.rule.range == "average":
            seen.copy_(torch.where(layer.gate, ranges.averaged(seen, found), seen))
        q = rounding.quantize(seen, grid)
    if layer.calibrating:
        return x  # type: ignore[no-any-return]
    static = {"scales": rounding.scale_values(q) + poison(amax(seen)), "zeros": q.zeros}
    return _OnGrid.apply(x, grid, layer.rule.ste, static)  # type: ignore[no-any-return, no-untyped-call]


class _OnGrid(torch.autograd.Function):
    """As `straight_through.fake_quantize`, of a DTensor."""

    @staticmethod
    def forward(ctx: Any, x: Any, grid: Grid, ste: str, static: dict[str, Any]) -> Tensor:
        local = x.to_local()
        if static:
            ctx.inside = rounding.unclipped(local, grid, **static) if ste == "masked" else None
            return _like(rounding.rounded(local, grid, **static), x)
        ctx.inside = spread.unclipped(local, x, grid) if ste == "masked" else None
        return _like(spread.values(local, x, grid), x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        gradient = gradients[0]
        if ctx.inside is not None:
            gradient = _like(masked(gradient.to_local(), ctx.inside), gradient)
        return gradient, None, None, None


def _like(local: Tensor, whole: Any) -> Tensor:
    """The DTensor of `local`, placed as `whole`."""
    shape = {"shape": whole.shape, "stride": whole.stride()}
    made: Tensor = DTensor.from_local(local, whole.device_mesh, whole.placements, run_check=False, **shape)
    return made
