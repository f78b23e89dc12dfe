"""The straight-through estimator (R12): values on a grid, with the gradient of unrounded ones, or masked where clipped."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.grid import Grid
from qkit.rules import Ste
from qkit_torchao.arithmetic import rounding
from qkit_torchao.cache.inputs import Input, inputs
from qkit_torchao.kernels import choose
from qkit_torchao.torch_private import is_transformed, unsafe_view, version

PLAIN = (Tensor, torch.nn.Parameter)


def fake_quantize(
    w: Tensor,
    grid: Grid,
    *,
    ste: Ste = "identity",
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    peak: Tensor | None = None,
) -> Tensor:
    """The values [..., n] that `w` would have after `dequantize(quantize(w, grid))`, bit for bit, in the type of `w`.

    The gradient with respect to `w` is the identity (Bengio, Leonard and Courville, 2013, the straight-through estimator), or,
    if `ste` is "masked", zero where a value was clipped. `scales`, `zeros` and `peak`: see `reference.fake_quantize`.
    """
    if not w.numel():  # a layer that no token reaches
        return w
    result: Tensor = _StraightThrough.apply(w, grid, ste, scales, zeros, peak)  # type: ignore[no-untyped-call]
    return result


def through(
    gradient: Tensor,
    w: Tensor,
    grid: Grid,
    *,
    gate: Tensor | None = None,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    peak: Tensor | None = None,
) -> Tensor:
    """The masked gradient of `w`, whose values have `gradient`: zero where `w` was clipped, unless `gate` is off."""
    inside = rounding.unclipped(w, grid, scales=scales, zeros=zeros, peak=peak)
    return masked(gradient, inside if gate is None else inside | ~gate)


def masked(gradient: Tensor, inside: Tensor) -> Tensor:
    """`gradient`, which may be a sparse one of some rows, where `inside`, else zero."""
    if not gradient.is_sparse:
        return torch.where(inside, gradient, 0.0)
    some = gradient.coalesce()
    rows = torch.where(inside[some.indices()[0]], some.values(), 0.0)
    return torch.sparse_coo_tensor(some.indices(), rows, some.shape, check_invariants=False)


def shared(x: Tensor, grid: Grid, *, taker: object, ste: Ste, rows: bool = False) -> Tensor:
    """`fake_quantize`, computed once for all layers that get the same `x`, as queries, keys and values do.

    A layer, the `taker`, that asks again for the same `x` starts another forward pass, and the values are computed again: a write
    to the memory of `x` that torch does not see, as through NumPy, must not go unnoticed.

    With `rows`, a contiguous `x` may come as [rows, n], which saves each of these layers a view of it.

    The cached result lives as long as `x`, so it must not refer to `x`. Masked gradients do, views do, and the gradient of a
    leaf does: there nothing is cached.
    """
    refers = ste == "masked" or (x.is_leaf and x.requires_grad) or type(x) not in PLAIN
    if torch.compiler.is_compiling() or refers or x.is_inference() or is_transformed():
        return fake_quantize(x, grid, ste=ste)
    state = (grid, rows, version(x), x.data_ptr(), torch.is_grad_enabled())
    kept = inputs.of(x)
    if kept is None:
        kept = Input(x, inputs)
    elif (before := kept.current(state)) is not None and id(taker) not in kept.takers:
        kept.takers.add(id(taker))
        return before
    if not x.numel():
        return x
    on_grid = choose.rounded(x.detach(), grid)
    result = _with_gradient(x, on_grid.reshape(-1, on_grid.shape[-1]) if rows and x.is_contiguous() else on_grid)
    kept.takers = {id(taker)}
    return kept.put(result, state)


def _with_gradient(x: Tensor, on_grid: Tensor) -> Tensor:
    """`on_grid`, with the gradient of `x` in another shape. A result of `x` in other memory, not a view that refers to `x`."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return on_grid
    result: Tensor = unsafe_view(x, on_grid.shape)
    result.data = on_grid
    return result


class _StraightThrough(torch.autograd.Function):
    """Forward: the quantized value itself. Backward: the gradient as it comes, or masked."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        w: Tensor, grid: Grid, ste: Ste, scales: Tensor | None, zeros: Tensor | None, peak: Tensor | None
    ) -> Tensor:
        return (
            choose.rounded(w, grid, peak=peak)
            if scales is None
            else rounding.rounded(w, grid, scales=scales, zeros=zeros)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        w, ctx.grid, ctx.ste, scales, zeros, peak = inputs
        if ctx.ste == "masked":
            ctx.save_for_backward(w, scales, zeros, peak)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.ste == "identity":
            return gradients[0], None, None, None, None, None
        w, scales, zeros, peak = ctx.saved_tensors
        to_w = through(gradients[0], w, ctx.grid, scales=scales, zeros=zeros, peak=peak)
        return to_w, None, None, None, None, None


def values_view(weight: Tensor, cached: Tensor, grid: Grid, *, ste: Ste, partners: tuple[Tensor, ...] = ()) -> Tensor:
    """`cached`, the values of `weight`, with the gradient of `fake_quantize`. Read it only.

    torch refuses to go back once `weight` has changed. Where the gradient is the identity, this is a view of `weight` with other
    memory: going back is free then, where a Function would call Python and copy the gradient.

    Args:
        partners: the other weights that share the tensor scale of `cached`.
    """
    if ste == "masked":
        peak = peak_of(
            weight, partners
        )  # now: going back, torch would refuse partners that have dropped their values since
        result: Tensor = _Masked.apply(weight, cached, grid, peak)  # type: ignore[no-untyped-call]
        return result
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return cached
    view = weight.view_as(weight)
    view.data = cached
    return view


def multiply_values(
    x: Tensor,
    weight: Tensor,
    cached: Tensor,
    bias: Tensor | None,
    grid: Grid,
    *,
    ste: Ste,
    partners: tuple[Tensor, ...] = (),
) -> Tensor:
    """x [..., inputs] times `cached`, the values of `weight` [outputs, inputs], plus `bias`; the gradient is as `values_view`'s.

    Without a bias `F.linear` transposes the weight. Here the transposed weight itself gets the values, at no extra cost.
    """
    if bias is None and ste == "identity" and weight.requires_grad and torch.is_grad_enabled():
        across = weight.t()
        across.data = cached.t()
        return torch.matmul(x, across)
    return F.linear(x, values_view(weight, cached, grid, ste=ste, partners=partners), bias)


class _Masked(torch.autograd.Function):
    """Forward: the cached values. Backward: the masked gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, cached: Tensor, grid: Grid, peak: Tensor | None) -> Tensor:
        ctx.grid = grid
        ctx.save_for_backward(weight, peak)
        return cached

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, peak = ctx.saved_tensors
        return through(gradients[0].to(weight.dtype), weight, ctx.grid, peak=peak), None, None, None


def peak_of(weight: Tensor, partners: Sequence[Tensor]) -> Tensor | None:
    """The largest magnitude of `weight` and its `partners`, float32 []; None without partners."""
    return rounding.shared_peak([weight, *partners]) if partners else None
