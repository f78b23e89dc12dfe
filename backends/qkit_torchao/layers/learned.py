"""Prepared layers that learn the scales of their weight beside it. Eager and compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.reference.learned import FIRST, is_offset, names, stored_names
from qkit.rules import Rule
from qkit_torchao.arithmetic import rounding
from qkit_torchao.arithmetic.learned import initial, steps, to_parameters, values_alone
from qkit_torchao.cache import values
from qkit_torchao.layers import prepare
from qkit_torchao.layers.become import become, forget_preparation
from qkit_torchao.layers.prepare import FakeEmbedding
from qkit_torchao.layers.prepared import FakeLinear, Prepared
from qkit_torchao.layers.straight_through import masked


class _Learned(Prepared):
    """The common part of these layers: parameters named as in `qkit.reference.learned`, and values computed at every call."""

    caches = False

    def _values(self, weight: Tensor, dtype: torch.dtype, *, cached: bool) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.where(self.gate, self._on_grid(weight), weight).to(dtype)
        return (weight if self.mode == "off" else self._on_grid(weight)).to(dtype)

    def _on_grid(self, weight: Tensor) -> Tensor:
        if self.rule.scales == "alone":
            return values_alone(weight, self.weight_grid, *self._ranges())
        return fake_quantize(weight, self.weight_grid, *self._ranges())

    def _ranges(self) -> list[Tensor]:
        return [self.get_parameter(name) for name in stored_names(self.weight_grid, self.rule.scales)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves as any module, but ranges stay in float32."""
        ranges = [one.detach() for one in self._ranges()]
        super()._apply(fn, recurse)
        for one, before in zip(self._ranges(), ranges, strict=True):
            if one.dtype != before.dtype:
                one.data = before.to(one.device)
        return self


class LearnedLinear(_Learned, FakeLinear):
    """A linear layer that learns its scales; see `FakeLinear`."""

    def _multiply_codes(self, x: Tensor) -> Tensor:
        raise BackendError(
            f'scales = "learned" with {self.rule.weight} @ {self.rule.activation}: on CUDA such a layer is deployed with '
            "products of codes, which learned scales are not trained with yet; give the weight groups, or use the grid's rule"
        )


class LearnedEmbedding(_Learned, FakeEmbedding):
    """An embedding that learns its scales; see `FakeEmbedding`."""


def prepare_layer(module: nn.Module, rule: Rule) -> Any:
    """See `Modules.prepare_layer`. Ranges begin with the values of the grid's rule, and train if the weight does.

    Where scales train alone, the weight and zero points are frozen.
    """
    assert rule.weight is not None
    if rule.scales == "rule":
        return prepare.prepare_layer(module, rule)
    layer = prepare.prepare_layer(module, rule, LearnedEmbedding if isinstance(module, nn.Embedding) else LearnedLinear)
    trains, alone = layer.weight.requires_grad, rule.scales == "alone"
    for name, value in zip(names(rule.weight), initial(layer.weight.detach(), rule.weight), strict=True):
        layer.register_parameter(name, nn.Parameter(value, requires_grad=trains and not (alone and is_offset(name))))
        if alone:
            layer.register_parameter(FIRST + name, nn.Parameter(value.clone(), requires_grad=False))
    if alone:
        layer.weight.requires_grad_(False)
    return layer


def restore_layer(layer: Any) -> Any:
    """See `qkit.engines.elsewhere.Restores.restore_layer`."""
    values.drop(layer.weight)
    plain = become(layer, nn.Embedding if isinstance(layer, nn.Embedding) else nn.Linear)
    forget_preparation(plain)
    del plain.rule
    return plain


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
