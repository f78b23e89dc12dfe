"""The quantized values of a weight, made once for every change of it; modules ask here, arithmetic is in `ops`."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from qkit.grid import Grid
from qkit.recipe import Ste
from qkit_torchao import ops, straight_through


class Values:
    """The quantized values of one weight, made when the weight has changed and used until it changes again.

    A change is seen by torch's version counter, by another storage, type or device, by any optimizer's step, and by `train()`
    and `eval()`. A write through `.data` outside of an optimizer is not; call `drop` after one. Copies and pickles are empty.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._stamp: tuple[Any, ...] = ()
        self._made: Tensor | None = None
        self._seen: Tensor | None = None
        _watch_optimizers()

    def __call__(self, weight: Tensor, dtype: torch.dtype, ste: Ste) -> Tensor:
        """`weight` on the grid, rounded to `dtype`; differentiable, straight through."""
        if _cannot_keep(weight):
            return straight_through.fake_quantize(weight, self.grid, ste=ste).to(dtype)
        stamp = (weight._version, weight.data_ptr(), weight.dtype, dtype, weight.device, _steps_taken)
        if stamp != self._stamp or self._made is None:
            with torch.inference_mode(False):  # or what is kept could not be trained with later
                self._made = ops.rounded(weight.detach(), self.grid).to(dtype)
                self._seen = weight.detach()  # keeps the storage, so that its address is not given to another
            self._stamp = stamp
        result: Tensor = _PassGradient.apply(weight, self._made, self.grid, ste)  # type: ignore[no-untyped-call]
        return result

    def drop(self) -> None:
        """Forgets; the next use makes them anew."""
        self._stamp, self._made, self._seen = (), None, None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Values":
        return Values(self.grid)

    def __reduce__(self) -> tuple[Any, ...]:
        return Values, (self.grid,)


def _cannot_keep(weight: Tensor) -> bool:
    """Where there is no version counter or address to tell a change by: traced, transformed and inference tensors."""
    if torch.compiler.is_compiling():
        return True
    return weight.is_inference() or bool(torch._C._functorch.is_functorch_wrapped_tensor(weight))


class _PassGradient(torch.autograd.Function):
    """Stands for `made` going forward and for `weight` going back."""

    @staticmethod
    def forward(weight: Tensor, made: Tensor, grid: Grid, ste: Ste) -> Tensor:
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, _, ctx.grid, ste = inputs
        ctx.dtype = weight.dtype
        ctx.save_for_backward(*([weight] if ste == "masked" else []))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].to(ctx.dtype)
        for weight in ctx.saved_tensors:
            gradient = _masked(gradient, ops.unclipped(weight, ctx.grid))
        return gradient, None, None, None


def _masked(gradient: Tensor, inside: Tensor) -> Tensor:
    """`gradient`, which may be a sparse one of some rows, where `inside`, else zero."""
    if not gradient.is_sparse:
        return torch.where(inside, gradient, 0.0)
    some = gradient.coalesce()
    rows = torch.where(inside[some.indices()[0]], some.values(), 0.0)
    return torch.sparse_coo_tensor(some.indices(), rows, some.shape, check_invariants=False)


_steps_taken = 0
_hook: Any = None


def _watch_optimizers() -> None:
    global _hook
    _hook = _hook or register_optimizer_step_post_hook(_count_step)


def _count_step(*_: Any) -> None:
    global _steps_taken
    _steps_taken += 1
