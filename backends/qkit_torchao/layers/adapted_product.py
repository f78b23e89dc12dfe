"""The product of a layer with an adapter, which stores nothing of the size of its weight for the backward pass.

The backward pass computes the merged weight and its values again, from the base, which does not change, and the factors. Where
the gradient passes straight through, it reaches the factors through products of their rank, as in peft.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qkit.qtensor import QTensor
from qkit.rules import Ste
from qkit_torchao.arithmetic.gains import slopes, to_gains
from qkit_torchao.arithmetic.merged import added, row_norms, shorten, stored, stretch
from qkit_torchao.kernels import merge


@dataclass(frozen=True, slots=True)
class Merging:
    """How a layer computes its values.

    Attributes:
        base: the base [outputs, inputs] of a converted layer, decoded; None where the base is a parameter.
        scale: the factor of the product of a LoRA.
        dtype: of the merged weight.
        ste: of the grid. `identity` where the layer is off.
        on_grid: the values of a merged weight, without a gradient; the weight itself where the layer is off.
        unclipped: where a merged weight is not clipped, for `masked`.
        codes: those of a merged weight, before gains, for the gradient of these; None without gains.
        at_once: one kernel: base, B, A and the type of the result -> the values; None where there is none.
        slopes_at_once: one kernel: B, A and the type of the result -> the slopes of `codes`; None where there is none.
    """

    base: Callable[[], Tensor] | None
    scale: float
    dtype: torch.dtype
    ste: Ste
    on_grid: Callable[[Tensor], Tensor]
    unclipped: Callable[[Tensor], Tensor]
    at_once: Callable[[Tensor | None, Tensor, Tensor, torch.dtype], Tensor] | None = None
    codes: Callable[[Tensor], QTensor[Tensor]] | None = None
    slopes_at_once: Callable[[Tensor, Tensor, torch.dtype], Tensor] | None = None


def multiply(
    x: Tensor,
    w: Tensor | None,
    factors: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    merging: Merging,
    dtype: torch.dtype,
    *,
    gains: Tensor | None = None,
) -> Tensor:
    """x [..., inputs] times the values, in `dtype`, of base `w` [outputs, inputs] and factors B, A, magnitude; plus `bias`.

    Args:
        gains: those that the functions of `merging` read, if scales train; their gradient goes there.
    """
    y: Tensor = _Product.apply(x, w, *factors, gains, bias, merging, dtype)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    """Stores the input and the factors, and references to the base."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor | None,
        b: Tensor,
        a: Tensor,
        magnitude: Tensor | None,
        gains: Tensor | None,
        bias: Tensor | None,
        merging: Merging,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.merging, ctx.dtype = merging, dtype
        ctx.save_for_backward(x, w, b, a, magnitude, gains)
        return F.linear(x, _values(w, b, a, magnitude, merging, dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, a, magnitude, gains = ctx.saved_tensors
        gradient, merging = gradients[0], ctx.merging
        with _without_autocast(gradient.device.type):
            to_x = to_w = to_bias = to_magnitude = of_gains = None
            rows, seen = gradient.flatten(0, -2), x.flatten(0, -2).to(gradient.dtype)
            if ctx.needs_input_grad[0]:
                values = _values(w, b, a, magnitude, merging, ctx.dtype)
                to_x = (rows @ values.to(gradient.dtype)).view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[5]:
                along, scales = _slopes(w, b, a, magnitude, merging, seen.dtype)
                of_gains = to_gains(rows, seen, along, scales, gains).to(gains.dtype)
            if magnitude is not None and merging.ste != "masked" and not ctx.needs_input_grad[1]:
                stretched, to_magnitude = _through_magnitude(
                    rows, seen, _base(merging, w), b, a, magnitude, merging.scale
                )
                to_b, to_a = _by_rank(stretched, seen, b, a, merging.scale)
            elif magnitude is not None or merging.ste == "masked" or ctx.needs_input_grad[1]:
                to_v, base = (rows.T @ seen).float(), _base(merging, w)
                if merging.ste == "masked":
                    to_v = torch.where(merging.unclipped(_merged(base, b, a, magnitude, merging)), to_v, 0.0)
                to_w, to_b, to_a, to_magnitude = _through(to_v, base, b, a, magnitude, merging.scale)
                to_w = to_w.to(w.dtype) if ctx.needs_input_grad[1] else None
            else:
                to_b, to_a = _by_rank(rows, seen, b, a, merging.scale)
            if ctx.needs_input_grad[6]:
                to_bias = rows.sum(dim=0)
        return to_x, to_w, to_b, to_a, to_magnitude, of_gains, to_bias, None, None


def _base(merging: Merging, w: Tensor | None) -> Tensor:
    if w is not None:
        return w.detach()
    assert merging.base is not None
    return merging.base()


def _values(
    w: Tensor | None, b: Tensor, a: Tensor, magnitude: Tensor | None, merging: Merging, dtype: torch.dtype
) -> Tensor:
    if merging.at_once is not None and magnitude is None:
        return merging.at_once(w, b.detach(), a.detach(), dtype)
    return merging.on_grid(_merged(_base(merging, w), b, a, magnitude, merging)).to(dtype)


def _slopes(
    w: Tensor | None, b: Tensor, a: Tensor, magnitude: Tensor | None, merging: Merging, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The slopes of values along the factors of scales, and the scales, where biases may have gains too."""
    if merging.slopes_at_once is not None and magnitude is None:
        return merging.slopes_at_once(b.detach(), a.detach(), dtype), None
    assert merging.codes is not None
    q = merging.codes(_merged(_base(merging, w), b, a, magnitude, merging))
    return slopes(q), q.scales


def _merged(base: Tensor, b: Tensor, a: Tensor, magnitude: Tensor | None, merging: Merging) -> Tensor:
    with torch.autocast(base.device.type, enabled=False):
        v = merge.added(base, b.detach(), a.detach(), merging.scale)
        if magnitude is not None:
            v = v * stretch(magnitude.detach(), row_norms(v))[..., None]
        return stored(v, merging.dtype)


def _by_rank(rows: Tensor, seen: Tensor, b: Tensor, a: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of B and A, from those of the output [n, outputs] and the input [n, inputs].

    Types of 16 bits have fewer digits than shortened factors, so that these are not shortened for them.
    """
    if rows.dtype == torch.float32:
        short_a, short_b = shorten(a.float()) * scale, shorten(b.float() * scale)
        return (rows.T @ (seen @ short_a.T)).to(b.dtype), ((rows @ short_b).T @ seen).to(a.dtype)
    short_a, short_b = (
        a.to(rows.dtype),
        b.to(rows.dtype),
    )  # a product takes the scale at no cost: a host feels each launch
    to_b = torch.addmm(short_b, rows.T, seen @ short_a.T, beta=0, alpha=scale)
    to_a = torch.addmm(short_a, (rows @ short_b).T, seen, beta=0, alpha=scale)
    return to_b.to(b.dtype), to_a.to(a.dtype)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _through_magnitude(
    rows: Tensor, seen: Tensor, base: Tensor, b: Tensor, a: Tensor, magnitude: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Of DoRA: the gradient of the output [n, outputs] times magnitudes over the lengths of rows; and the magnitudes' gradient.

    The lengths multiply rows of the weight, so that the gradients of B and A go through products of their rank.
    """
    v = merge.added(base, b.detach(), a.detach(), scale)
    norms = row_norms(v)
    moved = seen @ v.to(seen.dtype).T
    to_magnitude = (rows.float() * moved).sum(dim=0) / norms
    return rows * stretch(magnitude.detach(), norms).to(rows.dtype), to_magnitude.to(magnitude.dtype)


def _through(
    to_v: Tensor, base: Tensor, b: Tensor, a: Tensor, magnitude: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of the base, B, A and the magnitude, from that of the merged weight [outputs, inputs]."""
    to_magnitude = None
    if magnitude is not None:
        v = added(base, b.detach(), a.detach(), scale)
        norms = row_norms(v)
        to_magnitude = ((to_v * v).sum(dim=-1) / norms).to(magnitude.dtype)
        to_v = to_v * stretch(magnitude.detach(), norms)[..., None]
    to_b = scale * (to_v @ shorten(a.float()).mT)
    to_a = shorten(b.float() * scale).mT @ to_v
    return to_v, to_b.to(b.dtype), to_a.to(a.dtype), to_magnitude
