"""Prepared layers that learn the scales of their weight, beside it: `qkit/learned.py` in MLX. Eager and compiled."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qkit.element import MAX_SCALE_CODE, MIN_SCALE, MIN_SCALE_CODE
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit.reference.learned import FARTHEST, factor, names
from qkit.rules import Rule
from qkit_mlx.arithmetic import rounding
from qkit_mlx.layers.converted import (
    DeployedEmbedding,
    DeployedLinear,
    PackedEmbedding,
    PackedLinear,
    deploy_embedding,
    deploy_linear,
)
from qkit_mlx.layers.exact import Exact
from qkit_mlx.layers.prepared import FakeEmbedding, FakeLinear, _answer, switched_on


class _Learned(Exact):
    """What these layers share: parameters named as in `qkit.reference.learned`, and values that are made at every call."""

    @property
    def ranges(self) -> list[mx.array]:
        """The parameters of the grid."""
        return [self[name] for name in names(self.rule.weight)]

    def _on_grid_now(self, weight: mx.array, *ranges: mx.array) -> mx.array:
        return fake_quantize(weight, self.rule.weight, *ranges) if switched_on(self) else weight

    def _codes(self, weight: mx.array, *ranges: mx.array) -> QTensor[mx.array]:
        return quantize(weight, self.rule.weight, *ranges)


class LearnedLinear(_Learned, FakeLinear):
    """A linear layer that learns its scales; see `FakeLinear`."""

    def __call__(self, x: mx.array) -> mx.array:
        parameters = [self["weight"], *self.ranges, *([self["bias"]] if "bias" in self else [])]
        if self.training or self.calibrating or not switched_on(self):
            return self._forward(x, *parameters)
        return _answer(self._deployed, self._forward, x, *parameters)

    def _forward(self, x: mx.array, *parameters: mx.array) -> mx.array:  # type: ignore[override]  # ranges between
        (weight, *ranges), bias = self._split(parameters)
        x = self._on_grid(x, self.rule.activation, "input")
        w = self._on_grid_now(weight, *ranges)
        y = x @ w.T if bias is None else mx.addmm(bias, x, w.T)
        return self._on_grid(y, self.rule.output, "output")

    def _deploy(self, *parameters: mx.array) -> DeployedLinear | PackedLinear:  # type: ignore[override]
        (weight, *ranges), bias = self._split(parameters)
        return deploy_linear(self._codes(weight, *ranges), self.rule, bias=bias, static=self._static())

    def _split(self, parameters: tuple[mx.array, ...]) -> tuple[tuple[mx.array, ...], mx.array | None]:
        return (parameters[:-1], parameters[-1]) if "bias" in self else (parameters, None)


class LearnedEmbedding(_Learned, FakeEmbedding):
    """An embedding that learns its scales; see `FakeEmbedding`."""

    def __call__(self, x: mx.array) -> mx.array:
        def forward(*parameters: mx.array) -> mx.array:
            return self._on_grid_now(*parameters)[x]

        def deployed(*parameters: mx.array) -> mx.array:
            return self._deploy(*parameters)(x)

        if self.training or not switched_on(self):
            return forward(self["weight"], *self.ranges)
        return _answer(deployed, forward, self["weight"], *self.ranges)

    def as_linear(self, x: mx.array) -> mx.array:
        """The output head of a tied model: x [..., width] -> [..., entries]."""

        def forward(x: mx.array, *parameters: mx.array) -> mx.array:
            return x @ self._on_grid_now(*parameters).T

        def deployed(x: mx.array, *parameters: mx.array) -> mx.array:
            return self._deploy(*parameters).as_linear(x)

        if self.training or not switched_on(self):
            return forward(x, self["weight"], *self.ranges)
        return _answer(deployed, forward, x, self["weight"], *self.ranges)

    def _deploy(self, *parameters: mx.array) -> DeployedEmbedding | PackedEmbedding:
        return deploy_embedding(self._codes(*parameters), self.rule)


def fake(module: Any, rule: Rule) -> nn.Module:
    """See `Backend.fake`. Ranges begin as those that give the values of the grid's rule, and train if the weight does."""
    embedding = isinstance(module, nn.Embedding)
    if rule.scales == "rule":
        return FakeEmbedding(module, rule) if embedding else FakeLinear(module, rule)
    assert rule.weight is not None
    made: Any = LearnedEmbedding(module, rule) if embedding else LearnedLinear(module, rule)
    for name, value in zip(names(rule.weight), initial(made["weight"], rule.weight), strict=True):
        made[name] = value
    if "weight" in made._no_grad:
        made.freeze(keys=list(names(rule.weight)))
    return made  # type: ignore[no-any-return]


# The law, in MLX


def initial(w: mx.array, grid: Grid) -> tuple[mx.array, ...]:
    """The parameters that give `w` the values that the grid's own rule gives it."""
    x = rounding.group(w, grid)
    if grid.element.kind == "float":
        return (mx.zeros(x.shape[:-1]),)
    if grid.symmetric:
        return (rounding.symmetric_scale(x, grid),)
    return rounding.asymmetric_scale(x.min(axis=-1), x.max(axis=-1), grid.element)


def steps(w: mx.array, grid: Grid, p: mx.array, zero: mx.array | None = None) -> tuple[mx.array, mx.array | None]:
    """The fp32 step of each group of `w`, and its zero point under `minmax`: the parameters as they are used."""
    if grid.element.kind == "float":
        return _offset_steps(rounding.group(w, grid), grid, p), None
    s = rounding.round_to_bfloat16(p)
    if grid.scale == "signed":
        s = mx.where(mx.abs(s) < MIN_SCALE, mx.where(p < 0, -MIN_SCALE, MIN_SCALE), s)
    else:
        s = mx.maximum(s, MIN_SCALE)
    s = s + rounding.poison(p)
    if zero is None:
        return s, None
    return s, mx.clip(mx.round(zero), 0, grid.element.levels) + rounding.poison(zero)


def quantize(w: mx.array, grid: Grid, *parameters: mx.array) -> QTensor[mx.array]:
    """Codes of finite `w` on the scales that finite `parameters` give."""
    x = rounding.group(w, grid)
    s, z = steps(w, grid, *parameters)
    if z is not None:
        q = rounding.asymmetric_codes(x, rounding.each(s), rounding.each(z), grid.element).astype(mx.uint8)
        return QTensor(q.reshape(w.shape), s, grid, dtype_of(w), zeros=z.astype(mx.uint8))
    if grid.element.kind == "integer":
        q = rounding.symmetric_codes(x, rounding.each(s), grid.element).astype(mx.int8)
        return QTensor(q.reshape(w.shape), s, grid, dtype_of(w))
    c = rounding.exponent(s)
    return QTensor(rounding.float_codes(x, c, grid.element).reshape(w.shape), c, grid, dtype_of(w))


def fake_quantize(w: mx.array, grid: Grid, *parameters: mx.array) -> mx.array:
    """`learned.fake_quantize` of `w` [..., n] in its type, with the gradients of `learned.gradients`."""

    def forward(*primals: mx.array) -> mx.array:
        w, *ranges = map(mx.stop_gradient, primals)  # MLX asks for the jvp of what is inside too, and bits have none
        s, z = steps(w, grid, *ranges)
        return rounding.round_to_grid(w, grid, scales=s, zeros=z)

    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        w, *ranges = primals
        s, z = steps(w, grid, *ranges)
        inside = rounding.unclipped(w, grid, scales=s, zeros=z)
        to_w = mx.where(inside, cotangent, 0).astype(w.dtype)
        return to_w, *to_parameters(w, cotangent, inside, grid, s, z)

    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    return function(w, *parameters)  # type: ignore[no-any-return]


def to_parameters(
    w: mx.array, gradient: mx.array, inside: mx.array, grid: Grid, s: mx.array, z: mx.array | None
) -> list[mx.array]:
    """The gradients of the parameters, where the values of `w` have `gradient` and `w` is not clipped `inside`."""
    x, g, within = (
        rounding.group(w, grid),
        rounding.group(gradient, grid),
        inside.reshape(grid.group_shape(tuple(w.shape))),
    )
    v = rounding.group(rounding.round_to_grid(w.astype(mx.float32), grid, scales=s, zeros=z), grid)
    scaled = factor(grid, tuple(w.shape))
    moved = (g * (v - mx.where(within, x, 0.0))).sum(axis=-1) * scaled
    if grid.element.kind == "float":
        return [moved * math.log(2)]
    if z is None:
        return [moved / s]
    return [moved / s, mx.where(within, 0.0, g).sum(axis=-1) * -s * scaled]


def _offset_steps(x: mx.array, grid: Grid, offset: mx.array) -> mx.array:
    peak = rounding.amax(x)
    whole = mx.clip(mx.round(offset), -FARTHEST, FARTHEST).astype(mx.int32)
    c = mx.clip(rounding.scale_code(peak, grid) + whole, MIN_SCALE_CODE, MAX_SCALE_CODE)
    return rounding.power(c) + rounding.poison(peak) + rounding.poison(offset)
