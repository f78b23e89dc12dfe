"""The straight-through estimator on a read grid: values of a weight on scales that stay, with the gradient of the weight."""

from typing import Any

import torch
from torch import Tensor

from qkit.qtensor import QTensor
from qkit.rules import Ste
from qkit_torchao.arithmetic import stored


def fake_requantize(w: Tensor, like: QTensor[Tensor], *, ste: Ste) -> Tensor:
    """`stored.fake_requantize(w, like)`. The gradient of `w` is the identity, or masked, as in `straight_through`."""
    parts = like.parts()
    names, arrays = tuple(parts), tuple(parts.values())
    result: Tensor = _Onto.apply(w, like.grid, like.dtype, ste, names, *arrays)  # type: ignore[no-untyped-call]
    return result


class _Onto(torch.autograd.Function):
    """Forward: the values. Backward: the gradient as it comes, or masked."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, grid: Any, dtype: Any, ste: str, names: tuple[str, ...], *arrays: Tensor
    ) -> Tensor:
        like = QTensor(grid=grid, dtype=dtype, **dict(zip(names, arrays, strict=True)))
        ctx.nothing = 4 + len(arrays)
        ctx.ste = ste
        if ste == "masked":
            ctx.save_for_backward(stored.unclipped(w, like))
        return stored.fake_requantize(w, like)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_w = gradients[0]
        if ctx.ste == "masked":
            to_w = torch.where(ctx.saved_tensors[0], to_w, 0.0)
        return to_w, *[None] * ctx.nothing
