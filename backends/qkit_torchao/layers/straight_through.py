"""Fake quantisation with a gradient: the straight-through estimator, as it is or masked."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.grid import Grid
from qkit.rules import Ste
from qkit_torchao.arithmetic import rounding
from qkit_torchao.kernels import choose

PLAIN = (Tensor, torch.nn.Parameter)


def fake_quantize(
    w: Tensor, grid: Grid, *, ste: Ste = "identity", scales: Tensor | None = None, zeros: Tensor | None = None
) -> Tensor:
    """The values [..., n] that `w` would have after `dequantize(quantize(w, grid))`, bit for bit, in the type of `w`.

    The gradient with respect to `w` is the identity (Bengio, Leonard and Courville, 2013, the straight-through estimator), or,
    if `ste` is "masked", zero where a value was clipped. `scales` and `zeros`: see `reference.fake_quantize`.
    """
    if not w.numel():  # a layer that no token reaches
        return w
    result: Tensor = _StraightThrough.apply(w, grid, ste, scales, zeros)  # type: ignore[no-untyped-call]
    return result


def shared(x: Tensor, grid: Grid, *, ste: Ste, rows: bool = False) -> Tensor:
    """`fake_quantize`, made once for all layers that are given the same `x`, as queries, keys and values are.

    With `rows`, it may come as [rows, n], which saves each of these layers a view of it: where `x` lies in one piece.

    The result is kept on the tensor itself, and lives as long; so it must not keep `x`, as masked gradients do, views, and what
    comes back to `x` if that is a leaf.
    """
    keeps_itself = ste == "masked" or (x.is_leaf and x.requires_grad) or type(x) not in PLAIN
    if torch.compiler.is_compiling() or keeps_itself or x.is_inference() or transformed():
        return fake_quantize(x, grid, ste=ste)
    state = (grid, rows, x._version, x.data_ptr(), torch.is_grad_enabled())
    before, result = getattr(x, "_qkit_on_grid", (None, None))
    if result is None or before != state:
        if not x.numel():
            return x
        made = choose.rounded(x.detach(), grid)
        result = _through(x, made.reshape(-1, made.shape[-1]) if rows and x.is_contiguous() else made)
        x._qkit_on_grid = (state, result)  # type: ignore[attr-defined]
    shared: Tensor = result
    return shared


def _through(x: Tensor, made: Tensor) -> Tensor:
    """`made`, with the gradient of `x` in another shape: a result of `x`, not a view that would keep it, given other memory."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return made
    result: Tensor = torch.ops.aten._unsafe_view.default(x, made.shape)
    result.data = made
    return result


def transformed() -> bool:
    """Whether one of torch.func's transforms is at work, which wants Functions that it can look into."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class _StraightThrough(torch.autograd.Function):
    """Forward: the quantized value itself. Backward: the gradient as it comes, or where nothing was clipped."""

    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, grid: Grid, ste: Ste, scales: Tensor | None, zeros: Tensor | None) -> Tensor:
        return choose.rounded(w, grid) if scales is None else rounding.rounded(w, grid, scales=scales, zeros=zeros)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        w, ctx.grid, ctx.ste, scales, zeros = inputs
        if ctx.ste == "masked":
            ctx.save_for_backward(w, scales, zeros)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.ste == "identity":
            return gradients[0], None, None, None, None
        w, scales, zeros = ctx.saved_tensors
        inside = rounding.unclipped(w, ctx.grid, scales=scales, zeros=zeros)
        return torch.where(inside, gradients[0], 0.0), None, None, None, None


def stand_in(weight: Tensor, made: Tensor, grid: Grid, *, ste: Ste) -> Tensor:
    """`made`, the values of `weight`, with the gradient of `fake_quantize`; torch refuses to go back once `weight` has changed.

    It is for reading only. Where the gradient is the identity, this is a view of `weight` that has been given other memory:
    going back costs nothing then, where a Function would have Python called and the gradient copied.
    """
    if ste == "masked":
        result: Tensor = _Masked.apply(weight, made, grid)  # type: ignore[no-untyped-call]
        return result
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return made
    view = weight.view_as(weight)
    view.data = made
    return view


def linear(x: Tensor, weight: Tensor, made: Tensor, bias: Tensor | None, grid: Grid, *, ste: Ste) -> Tensor:
    """x [..., inputs] times `made`, which stands in for `weight` [outputs, inputs], plus `bias`.

    Without a bias the weight is transposed anyway, and what is transposed can stand in: at no cost over a float layer.
    """
    if bias is None and ste == "identity" and weight.requires_grad and torch.is_grad_enabled():
        across = weight.t()
        across.data = made.t()
        return torch.matmul(x, across)
    return F.linear(x, stand_in(weight, made, grid, ste=ste), bias)


class _Masked(torch.autograd.Function):
    """Stands for `made` going forward and for `weight`, where it was not clipped, going back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, made: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        ctx.save_for_backward(weight)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return masked(gradients[0].to(weight.dtype), rounding.unclipped(weight, ctx.grid)), None, None


def masked(gradient: Tensor, inside: Tensor) -> Tensor:
    """`gradient`, which may be a sparse one of some rows, where `inside`, else zero."""
    if not gradient.is_sparse:
        return torch.where(inside, gradient, 0.0)
    some = gradient.coalesce()
    rows = torch.where(inside[some.indices()[0]], some.values(), 0.0)
    return torch.sparse_coo_tensor(some.indices(), rows, some.shape, check_invariants=False)
