"""Adapters on prepared and converted layers: they compute with the grid's value of the merged weight, and merge into it.

`qkit.reference.merged` is the law of the merged weight; functions here have its names. Exact eager and compiled.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qkit.element import MIN_SCALE
from qkit.grid import Grid
from qkit.qtensor import DType, dtype_of
from qkit.reference.merged import DROPPED, Update
from qkit_mlx.arithmetic import rounding
from qkit_mlx.arithmetic.ranges import given
from qkit_mlx.layers.converted import DEPLOYED, STORED, DeployedLinear, PackedLinear, deploy_linear
from qkit_mlx.layers.prepared import FakeLinear, _answer

NAMES = ("lora_a", "lora_b", "m")


class _Adapted(nn.Module):
    """What adapted layers share: the parameters of the adapter."""

    @property
    def adapter(self) -> str:
        """Kind and rank."""
        return f"{'dora' if 'm' in self else 'lora'}, rank {self['lora_a'].shape[1]}"

    def merge_into(self, w: mx.array, dtype: DType) -> mx.array:
        """The merged weight of base `w` [outputs, inputs], in `dtype`."""
        trained = [self[name] for name in NAMES if name in self]
        return merge_weights(w, *trained, scale=self.lora_scale, dtype=dtype)


class AdaptedLinear(_Adapted, FakeLinear):
    """A prepared layer with an adapter; `weight` is the base."""

    def __call__(self, x: mx.array) -> mx.array:
        base = self["weight"]
        self["weight"] = self.merged()  # for as long as a prepared layer computes with it
        try:
            return FakeLinear.__call__(self, x)
        finally:
            self["weight"] = base

    def merged(self) -> mx.array:
        """The merged weight [outputs, inputs], in the type of the base."""
        return self.merge_into(self["weight"], dtype_of(self["weight"]))


class _AdaptedDeployed(_Adapted):
    """A converted layer with an adapter: its codes are the base, decoded in each forward.

    In evaluation mode the layer that a merge would make answers, as in prepared layers.
    """

    def __call__(self, x: mx.array) -> mx.array:
        parameters = [self.merged(), *([self["bias"]] if "bias" in self else [])]
        return (
            self._forward(x, *parameters) if self.training else _answer(self._deployed, self._forward, x, *parameters)
        )

    def merged(self) -> mx.array:
        """The merged weight [outputs, inputs], in float32."""
        return self.merge_into(rounding.dequantize(replace(self.qtensor(), dtype="float32")), "float32")

    def _forward(self, x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
        rule = self.rule
        values = rounding.to_dtype(rounding.fake_quantize(weight, rule.weight, ste=rule.ste), dtype_of(x))
        x = self._on_grid(x, rule.activation, "input")
        y = x @ values.T if bias is None else mx.addmm(bias, x, values.T)
        return self._on_grid(y, rule.output, "output")

    def _on_grid(self, x: mx.array, grid: Grid | None, name: str) -> mx.array:
        if grid is None:
            return x
        return rounding.fake_quantize(x, grid, ste=self.rule.ste, **given(self, grid, name=name))

    def _deployed(self, x: mx.array, *parameters: mx.array) -> mx.array:
        return self.deploy(*parameters)(x)

    def deploy(self, weight: mx.array, bias: mx.array | None = None) -> DeployedLinear | PackedLinear:
        """The converted layer with the codes of `weight`."""
        q = replace(rounding.quantize(weight, self.rule.weight), dtype=self.dtype)
        static = {name: self[name] for name in STORED if name in self and name not in ("bias", *NAMES)}
        return deploy_linear(q, self.rule, bias=bias, static=static)


class AdaptedDeployed(_AdaptedDeployed, DeployedLinear):
    """On a layer of MLX's."""


class AdaptedPacked(_AdaptedDeployed, PackedLinear):
    """On a layer that decodes first."""


def adapt(module: Any, update: Update) -> Any:
    """See `Backend.adapt`."""
    if isinstance(module, DEPLOYED):
        made = _become(module, AdaptedDeployed if isinstance(module, DeployedLinear) else AdaptedPacked)
    else:
        made = _become(module, AdaptedLinear)
    made.freeze(recurse=False)
    made.lora_a, made.lora_b = mx.array(update.a.T), mx.array(update.b.T)
    if update.magnitude is not None:
        made.m = mx.array(update.magnitude)
    made.lora_scale = update.scale
    return made


def update(module: Any) -> Update:
    """See `Backend.update`."""
    a, b, m = (np.array(module[name].astype(mx.float32)) if name in module else None for name in NAMES)
    assert a is not None
    assert b is not None
    return Update(a.T.copy(), b.T.copy(), module.lora_scale, m)


def merged(module: Any) -> Any:
    """See `Backend.merged`."""
    if isinstance(module, DEPLOYED):
        made = module.deploy(module.merged(), module.get("bias"))
        made.train(module.training)
        return made
    made = _become(module, FakeLinear)
    for name in (*NAMES, "lora_scale"):
        made.pop(name, None)
        made.__dict__.pop(name, None)
    made.weight = module.merged()
    made.train(module.training)
    return made


def freeze(model: nn.Module) -> None:
    """See `Backend.freeze`."""
    model.freeze()
    for module in model.modules():
        if isinstance(module, _Adapted):
            module._no_grad.difference_update(NAMES)


def _become(module: Any, cls: type[nn.Module]) -> Any:
    """A module of another class with the arrays, attributes and mode of `module`."""
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    dict.update(made, module)
    made.__dict__.update(
        {key: set(value) if isinstance(value, set) else value for key, value in module.__dict__.items()}
    )
    return made


def merge_weights(
    w: mx.array, a: mx.array, b: mx.array, m: mx.array | None = None, *, scale: float, dtype: DType
) -> mx.array:
    """The merged weight in `dtype` of mlx-lm's `a` [inputs, rank] and `b` [rank, outputs].

    The gradient passes through the shortening and the rounding as it comes.
    """

    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        w, a, b, *rest = primals
        to_v, to_m = cotangent.astype(mx.float32), []
        if rest:
            v = added(w, b.T, a.T, scale)
            norms = row_norms(v)
            to_m = [((to_v * v).sum(axis=1) / norms).astype(rest[0].dtype)]
            to_v = to_v * (rest[0].astype(mx.float32) / norms)[:, None]
        to_b = scale * (to_v @ shorten(a.astype(mx.float32)))
        to_a = shorten(b.astype(mx.float32) * scale) @ to_v
        return (to_v.astype(w.dtype), to_a.T.astype(a.dtype), to_b.T.astype(b.dtype), *to_m)

    def forward(*primals: mx.array) -> mx.array:
        w, a, b, *rest = map(
            mx.stop_gradient, primals
        )  # MLX asks for the jvp of what is inside too, and bits have none
        v = added(w, b.T, a.T, scale)
        return stored(v if not rest else v * (rest[0].astype(mx.float32) / row_norms(v))[:, None], dtype)

    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    return function(w, a, b, *([] if m is None else [m]))  # type: ignore[no-any-return]


# The law, in MLX


def added(w: mx.array, b: mx.array, a: mx.array, scale: float) -> mx.array:
    """V = W + scale * B A, in float32; B [outputs, rank], A [rank, inputs]."""
    return w.astype(mx.float32) + product(shorten(b.astype(mx.float32) * scale), shorten(a.astype(mx.float32)))


def product(b: mx.array, a: mx.array) -> mx.array:
    """B A of shortened factors [outputs, rank] and [rank, inputs], summed from the first column of B to the last."""
    total = b[:, :1] * a[:1]
    for k in range(1, len(a)):
        total = total + b[:, k : k + 1] * a[k : k + 1]
    return total


def row_norms(v: mx.array) -> mx.array:
    """Lengths [outputs] of the rows of `v`, shortened; at least 2^-96."""
    squares = shorten(v).square()
    n = 1 << (v.shape[1] - 1).bit_length()
    squares = mx.pad(squares, [(0, 0), (0, n - v.shape[1])])
    while n > 1:
        n //= 2
        squares = squares[:, :n] + squares[:, n:]
    return mx.maximum(mx.sqrt(squares[:, 0]), MIN_SCALE)


def shorten(x: mx.array) -> mx.array:
    """`x` with 12 significant bits, ties to even."""
    return _significant(x, DROPPED)


def stored(x: mx.array, dtype: DType) -> mx.array:
    """float32 `x` rounded to `dtype`, also where a compiler takes a cast down and up again for nothing."""
    if dtype == "bfloat16":
        x = _significant(x, 16)
    elif dtype == "float16":
        x = mx.where(mx.abs(x) < 2.0**-14, mx.round(x * 2.0**24) * 2.0**-24, _significant(x, 13))
    return rounding.to_dtype(x, dtype)


def _significant(x: mx.array, dropped: int) -> mx.array:
    u = rounding.bits(x)
    return ((u + ((1 << dropped - 1) - 1) + ((u >> dropped) & 1)) & ~((1 << dropped) - 1)).view(mx.float32)
