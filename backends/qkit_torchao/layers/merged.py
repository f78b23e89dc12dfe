"""The merged weight of a layer or of experts, with its gradient: `arithmetic.merged` under autograd."""

from typing import Any

import torch
from torch import Tensor

from qkit_torchao.arithmetic.merged import added, row_norms, shorten, stored, stretch


def merge(w: Tensor, b: Tensor, a: Tensor, magnitude: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """The merged weight of base `w` [..., outputs, inputs], in `dtype`; gradients pass straight through its roundings."""
    merged: Tensor = _Merged.apply(w, b, a, magnitude, scale, dtype)  # type: ignore[no-untyped-call]
    return merged


class _Merged(torch.autograd.Function):
    """The merged weight in a given type; the gradient passes through the shortening and the rounding as it comes."""

    @staticmethod
    def forward(w: Tensor, b: Tensor, a: Tensor, magnitude: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
        v = added(w, b, a, scale)
        return stored(v if magnitude is None else v * stretch(magnitude, row_norms(v))[..., None], dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        w, b, a, magnitude, ctx.scale, _ = inputs
        ctx.dtype = w.dtype
        ctx.save_for_backward(b, a, *(() if magnitude is None else (w, magnitude)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        b, a, *more = ctx.saved_tensors
        to_v, to_magnitude = gradients[0].float(), None
        with torch.autocast(to_v.device.type, enabled=False):
            if more:
                w, magnitude = more
                v = added(w, b, a, ctx.scale)
                norms = row_norms(v)
                to_magnitude = ((to_v * v).sum(dim=-1) / norms).to(magnitude.dtype)
                to_v = to_v * stretch(magnitude, norms)[..., None]
            to_b = ctx.scale * (to_v @ shorten(a.float()).mT)
            to_a = shorten(b.float() * ctx.scale).mT @ to_v
        to_w = to_v.to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return to_w, to_b.to(b.dtype), to_a.to(a.dtype), to_magnitude, None, None
