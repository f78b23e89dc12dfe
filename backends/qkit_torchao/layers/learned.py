"""Prepared layers that learn the scales of their weight, beside it: `qkit/learned.py` in torch. Eager and compiled."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.element import MAX_SCALE_CODE, MIN_SCALE, MIN_SCALE_CODE
from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.reference.learned import FARTHEST, factor, names
from qkit.rules import Rule
from qkit_torchao.arithmetic import rounding
from qkit_torchao.layers import prepared
from qkit_torchao.layers.prepared import FakeEmbedding, FakeLinear, _Prepared
from qkit_torchao.layers.straight_through import masked


class _Learned(_Prepared):
    """What these layers share: parameters named as in `qkit.reference.learned`, and values that are made at every call."""

    def weight_values(self, dtype: torch.dtype) -> Tensor:
        """The weight's quantized values in `dtype`, or the weight where the layer is switched off."""
        if torch.compiler.is_compiling():
            return torch.where(self.gate, self._on_grid(), self.weight).to(dtype)
        return (self.weight if self.mode == "off" else self._on_grid()).to(dtype)

    def _on_grid(self) -> Tensor:
        return fake_quantize(self.weight, self.weight_grid, *self._ranges())

    def _ranges(self) -> list[Tensor]:
        return [self.get_parameter(name) for name in names(self.weight_grid)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves as any module, but ranges stay in float32."""
        kept = [one.detach() for one in self._ranges()]
        super()._apply(fn, recurse)
        for one, before in zip(self._ranges(), kept, strict=True):
            if one.dtype != before.dtype:
                one.data = before.to(one.device)
        return self


class LearnedLinear(_Learned, FakeLinear):
    """A linear layer that learns its scales; see `FakeLinear`."""

    def _values_product(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return F.linear(self.slot(x, "input", self.rule.activation), self.weight_values(dtype), self.bias)

    def _product(self, x: Tensor) -> Tensor:
        raise BackendError(
            f'scales = "learned" with {self.rule.weight} @ {self.rule.activation}: on CUDA such a layer is deployed with '
            "products of codes, which learned scales are not trained with yet; give the weight groups, or use the grid's rule"
        )


class LearnedEmbedding(_Learned, FakeEmbedding):
    """An embedding that learns its scales; see `FakeEmbedding`."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [...] -> [..., width]."""
        options = (self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
        return F.embedding(tokens, self.weight_values(self.weight.dtype), *options)


def fake(module: nn.Module, rule: Rule) -> Any:
    """See `Backend.fake`. Ranges begin as those that give the values of the grid's rule, and train if the weight does."""
    assert rule.weight is not None
    if rule.scales == "rule":
        return prepared.fake(module, rule)
    made = prepared.fake(module, rule, LearnedEmbedding if isinstance(module, nn.Embedding) else LearnedLinear)
    for name, value in zip(names(rule.weight), initial(made.weight.detach(), rule.weight), strict=True):
        made.register_parameter(name, nn.Parameter(value, requires_grad=made.weight.requires_grad))
    return made


def fake_quantize(w: Tensor, grid: Grid, *parameters: Tensor) -> Tensor:
    """`learned.fake_quantize` of `w` [..., n] in its type, with the gradients of `learned.gradients`."""
    result: Tensor = _OnGrid.apply(w, grid, *parameters)  # type: ignore[no-untyped-call]
    return result


class _OnGrid(torch.autograd.Function):
    """Forward: the quantized value itself. Backward: to the weight where it was not clipped, and to its ranges."""

    @staticmethod
    def forward(w: Tensor, grid: Grid, *parameters: Tensor) -> Tensor:
        s, z = steps(w, grid, *parameters)
        return rounding.rounded(w, grid, scales=s, zeros=z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        w, ctx.grid, *parameters = inputs
        ctx.save_for_backward(w, *parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        w, *parameters = ctx.saved_tensors
        s, z = steps(w, ctx.grid, *parameters)
        inside = rounding.unclipped(w, ctx.grid, scales=s, zeros=z)
        to_w = masked(gradients[0], inside)
        whole = gradients[0].to_dense() if gradients[0].is_sparse else gradients[0]
        return to_w, None, *to_parameters(w, whole, inside, ctx.grid, s, z)


# The law, in torch


def initial(w: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """The parameters that give `w` the values that the grid's own rule gives it."""
    x = rounding.group(w, grid)
    if grid.element.kind == "float":
        return (torch.zeros(x.shape[:-1], device=w.device),)
    return (rounding.symmetric_scale(x, grid),) if grid.symmetric else rounding.asymmetric_scale(x, grid.element)


def steps(w: Tensor, grid: Grid, p: Tensor, zero: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The fp32 step of each group of `w`, and its zero point under `minmax`: the parameters as they are used."""
    if grid.element.kind == "float":
        return _offset_steps(rounding.group(w, grid), grid, p), None
    s = rounding.round_to_bfloat16(p)
    if grid.scale == "signed":
        s = torch.where(s.abs() < MIN_SCALE, torch.where(p < 0, -MIN_SCALE, MIN_SCALE), s)
    else:
        s = s.clamp_min(MIN_SCALE)
    s = s + rounding.poison(p)
    if zero is None:
        return s, None
    return s, torch.round(zero).clamp(0, grid.element.levels) + rounding.poison(zero)


def to_parameters(w: Tensor, gradient: Tensor, inside: Tensor, grid: Grid, s: Tensor, z: Tensor | None) -> list[Tensor]:
    """The gradients of the parameters, where the values of `w` have `gradient` and `w` is not clipped `inside`."""
    x, g, within = (
        rounding.group(w, grid),
        rounding.group(gradient, grid),
        inside.reshape(grid.group_shape(tuple(w.shape))),
    )
    v = rounding.group(rounding.rounded(w.to(torch.float32), grid, scales=s, zeros=z), grid)
    scaled = factor(grid, tuple(w.shape))
    moved = (g * (v - torch.where(within, x, 0.0))).sum(dim=-1) * scaled
    if grid.element.kind == "float":
        return [moved * math.log(2)]
    if z is None:
        return [moved / s]
    return [moved / s, torch.where(within, 0.0, g).sum(dim=-1) * -s * scaled]


def _offset_steps(x: Tensor, grid: Grid, offset: Tensor) -> Tensor:
    peak = rounding.amax(x)
    whole = torch.round(offset).clamp(-FARTHEST, FARTHEST).to(torch.int32)
    c = (rounding.scale_code(peak, grid).to(torch.int32) + whole).clamp(MIN_SCALE_CODE, MAX_SCALE_CODE)
    return rounding.power(c) + rounding.poison(peak) + rounding.poison(offset)
