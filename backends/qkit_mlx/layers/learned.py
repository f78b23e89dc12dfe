"""Prepared layers with learned scales: parameters beside the weight, named as in `qkit.reference.learned`. Modules only."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qkit.qtensor import QTensor
from qkit.reference.learned import FIRST, is_offset, names, stored_names
from qkit.rules import Rule
from qkit_mlx.arithmetic import learned
from qkit_mlx.layers.converted import (
    PackedEmbedding,
    PackedLinear,
    PlainEmbedding,
    PlainLinear,
    pack_embedding,
    pack_linear,
)
from qkit_mlx.layers.float32_scales import Float32Scales
from qkit_mlx.layers.prepared import FakeEmbedding, FakeLinear, evaluate_packed, quantizes
from qkit_mlx.mlx_private import frozen_names


class _Learned(Float32Scales):
    """The parameters of the grid, and the values on it, which each call computes."""

    @property
    def ranges(self) -> list[mx.array]:
        """The learned parameters of the grid, in the order of `stored_names`."""
        return [self[name] for name in stored_names(self.rule.weight, self.rule.scales)]

    def grid_values(self) -> mx.array:
        """See `Readable.grid_values`."""
        return self._learned_values(self["weight"], *self.ranges)

    def _learned_values(self, weight: mx.array, *ranges: mx.array) -> mx.array:
        if not quantizes(self):
            return weight
        values = learned.values_alone if self.rule.scales == "alone" else learned.fake_quantize
        return values(weight, self.rule.weight, *ranges)

    def _learned_codes(self, weight: mx.array, *ranges: mx.array) -> QTensor[mx.array]:
        quantize = learned.quantize_alone if self.rule.scales == "alone" else learned.quantize
        return quantize(weight, self.rule.weight, *ranges)


class LearnedLinear(_Learned, FakeLinear):
    """A linear layer that learns its scales; see `FakeLinear`."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., inputs] -> [..., outputs]."""
        parameters = [self["weight"], *self.ranges, *([self["bias"]] if "bias" in self else [])]
        if self.training or self.calibrating or not quantizes(self):
            return self._run_prepared(x, *parameters)
        return evaluate_packed(self._run_packed, self._run_prepared, x, *parameters)

    def _run_prepared(self, x: mx.array, *parameters: mx.array) -> mx.array:  # type: ignore[override]  # ranges between
        (weight, *ranges), bias = self._split(parameters)
        x = self._on_grid(x, self.rule.activation, "input")
        w = self._learned_values(weight, *ranges)
        y = x @ w.T if bias is None else mx.addmm(bias, x, w.T)
        return self._on_grid(y, self.rule.output, "output")

    def _pack(self, *parameters: mx.array) -> PackedLinear | PlainLinear:  # type: ignore[override]
        (weight, *ranges), bias = self._split(parameters)
        return pack_linear(self._learned_codes(weight, *ranges), self.rule, bias=bias, static=self._static())

    def _split(self, parameters: tuple[mx.array, ...]) -> tuple[tuple[mx.array, ...], mx.array | None]:
        return (parameters[:-1], parameters[-1]) if "bias" in self else (parameters, None)


class LearnedEmbedding(_Learned, FakeEmbedding):
    """An embedding that learns its scales; see `FakeEmbedding`."""

    def __call__(self, x: mx.array) -> mx.array:
        """Row numbers x [...] -> [..., width]."""

        def run_prepared(*parameters: mx.array) -> mx.array:
            return self._learned_values(*parameters)[x]

        def run_packed(*parameters: mx.array) -> mx.array:
            return self._pack(*parameters)(x)

        if self.training or not quantizes(self):
            return run_prepared(self["weight"], *self.ranges)
        return evaluate_packed(run_packed, run_prepared, self["weight"], *self.ranges)

    def as_linear(self, x: mx.array) -> mx.array:
        """The output head of a tied model: x [..., width] -> [..., entries]."""

        def run_prepared(x: mx.array, *parameters: mx.array) -> mx.array:
            return x @ self._learned_values(*parameters).T

        def run_packed(x: mx.array, *parameters: mx.array) -> mx.array:
            return self._pack(*parameters).as_linear(x)

        if self.training or not quantizes(self):
            return run_prepared(x, self["weight"], *self.ranges)
        return evaluate_packed(run_packed, run_prepared, x, self["weight"], *self.ranges)

    def _pack(self, weight: mx.array, *ranges: mx.array) -> PackedEmbedding | PlainEmbedding:
        return pack_embedding(self._learned_codes(weight, *ranges), self.rule)


def prepare_layer(module: Any, rule: Rule) -> nn.Module:
    """See the protocol's `prepare_layer`. Learned parameters begin at the values of the grid's rule, frozen if the weight is.

    Where scales train alone, the weight and zero points are frozen.
    """
    embedding = isinstance(module, nn.Embedding)
    if rule.scales == "rule":
        return FakeEmbedding(module, rule) if embedding else FakeLinear(module, rule)
    assert rule.weight is not None
    layer: Any = LearnedEmbedding(module, rule) if embedding else LearnedLinear(module, rule)
    for name, value in zip(names(rule.weight), learned.initial(layer["weight"], rule.weight), strict=True):
        layer[name] = value
        if rule.scales == "alone":
            layer[FIRST + name] = mx.array(value)
    freeze_ranges(layer, rule)
    return layer  # type: ignore[no-any-return]


def freeze_ranges(layer: Any, rule: Rule) -> None:
    """Freezes the learned parameters of a layer whose weight is frozen; else, where scales train alone, all but these."""
    assert rule.weight is not None
    mine = stored_names(rule.weight, rule.scales)
    if "weight" in frozen_names(layer):
        layer.freeze(keys=list(mine))
    elif rule.scales == "alone":
        layer.freeze(keys=["weight", *[name for name in mine if name.startswith(FIRST) or is_offset(name)]])


def restore_layer(layer: Any) -> nn.Module:
    """See the protocol's `restore_layer`."""
    cls: Any = nn.Embedding if isinstance(layer, nn.Embedding) else nn.Linear
    plain = cls.__new__(cls)
    nn.Module.__init__(plain)  # not Linear's, which draws a random weight
    for name in ("weight", "bias"):
        if name in layer:
            plain[name] = layer[name]
    plain.freeze(keys=list(frozen_names(layer)))
    plain.train(layer.training)
    return plain  # type: ignore[no-any-return]
