"""Adapters on prepared and converted layers. The layers compute with the quantized merged weight, and merge into it.

`qkit.reference.merged` is the law of the merged weight. Eager and compiled layers follow it exactly.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qkit.errors import StageError
from qkit.grid import Grid
from qkit.qtensor import DType, dtype_of
from qkit.reference.merged import Update
from qkit_mlx.arithmetic import rounding, stored
from qkit_mlx.arithmetic.merged import merged
from qkit_mlx.arithmetic.ranges import stored_scales
from qkit_mlx.cache.values import LastValue
from qkit_mlx.kernels import choose
from qkit_mlx.layers import adapted_experts, experts, fused
from qkit_mlx.layers.become import become
from qkit_mlx.layers.converted import CONVERTED, STORED, PackedLinear, PlainLinear, pack_linear, unpack
from qkit_mlx.layers.prepared import FakeLinear, evaluate_packed
from qkit_mlx.layers.straight_through import fake_quantize, fake_requantize
from qkit_mlx.mlx_private import frozen_names

NAMES = ("lora_a", "lora_b", "m")  #: of the parameters of an adapter


class _Adapted(nn.Module):
    """The parameters of the adapter, which all adapted layers share."""

    def own_weight(self) -> mx.array:
        """The merged weight, for layers that share its tensor scale."""
        found: mx.array = self.merged()
        return found

    @property
    def adapter(self) -> str:
        """Kind and rank."""
        return f"{'dora' if 'm' in self else 'lora'}, rank {self['lora_a'].shape[1]}"

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """The merged layer on its grid, for mlx-lm's `fuse`.

        Raises:
            StageError: `dequantize`, which would move the weight off the grid.
        """
        if dequantize:
            raise StageError(
                "a layer on a grid is not fused into float: call qkit.merge(model), then qkit.unprepare(model)"
            )
        merged: nn.Module = merge_adapter(self)
        return merged

    def merge_into(self, w: mx.array, dtype: DType) -> mx.array:
        """The merged weight of base `w` [outputs, inputs], in `dtype`."""
        trained = [self[name] for name in NAMES if name in self]
        return merged(w, *trained, scale=self.lora_scale, dtype=dtype)


class AdaptedLinear(_Adapted, FakeLinear):
    """A prepared layer with an adapter; `weight` is the base."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., inputs] -> [..., outputs]."""
        base = self["weight"]
        self["weight"] = self.merged()  # only while the prepared layer computes with it
        try:
            return FakeLinear.__call__(self, x)
        finally:
            self["weight"] = base

    def merged(self) -> mx.array:
        """The merged weight [outputs, inputs], in the type of the base."""
        return self.merge_into(self["weight"], dtype_of(self["weight"]))


class _AdaptedConverted(_Adapted):
    """A converted layer with an adapter. Its codes are the base, which each call decodes.

    In evaluation the layer that a merge would create computes the output, as in prepared layers.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., inputs] -> [..., outputs]."""
        parameters = [self.merged(), *([self["bias"]] if "bias" in self else [])]
        if self.training:
            return self._run_prepared(x, *parameters)
        return evaluate_packed(self._run_packed, self._run_prepared, x, *parameters)

    def merged(self) -> mx.array:
        """The merged weight [outputs, inputs], in float32."""
        return self.merge_into(rounding.dequantize(replace(unpack(self), dtype="float32")), "float32")

    def pack(self, weight: mx.array, bias: mx.array | None = None) -> PackedLinear | PlainLinear:
        """The converted layer, without an adapter, with the codes of `weight`."""
        if self.grid.read:
            q = stored.requantize(weight, unpack(self))
        else:
            q = choose.quantize(weight, self.rule.weight, peak=fused.peak(self, weight))
        q = replace(q, dtype=self.dtype)
        static = {name: self[name] for name in STORED if name in self and name not in ("bias", *NAMES)}
        return pack_linear(q, self.rule, bias=bias, static=static)

    def _run_prepared(self, x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
        rule = self.rule
        if self.grid.read:
            values = fake_requantize(weight, unpack(self), ste=rule.ste)
        else:
            values = fake_quantize(weight, rule.weight, ste=rule.ste, peak=fused.peak(self, weight))
        values = rounding.to_dtype(values, dtype_of(x))
        x = self._on_grid(x, rule.activation, "input")
        y = x @ values.T if bias is None else mx.addmm(bias, x, values.T)
        return self._on_grid(y, rule.output, "output")

    def _run_packed(self, x: mx.array, *parameters: mx.array) -> mx.array:
        return self.pack(*parameters)(x)

    def _on_grid(self, x: mx.array, grid: Grid | None, name: str) -> mx.array:
        if grid is None:
            return x
        return fake_quantize(x, grid, ste=self.rule.ste, **stored_scales(self, grid, name=name))


class AdaptedPacked(_AdaptedConverted, PackedLinear):
    """A converted layer in one of MLX's containers, with an adapter."""


class AdaptedPlain(_AdaptedConverted, PlainLinear):
    """A converted layer in plain arrays, with an adapter."""


def adapt(module: Any, update: Update) -> Any:
    """See the protocol's `adapt`."""
    if isinstance(module, CONVERTED):
        layer = become(module, AdaptedPacked if isinstance(module, PackedLinear) else AdaptedPlain)
        layer.cached_peak = LastValue()
    else:
        layer = become(module, AdaptedLinear)
    layer.freeze(recurse=False)
    layer.lora_a, layer.lora_b = mx.array(update.a.T), mx.array(update.b.T)
    if update.magnitude is not None:
        layer.m = mx.array(update.magnitude)
    layer.lora_scale = update.scale
    return layer


def adapter_update(module: Any) -> Update:
    """See the protocol's `adapter_update`."""
    a, b, m = (np.array(module[name].astype(mx.float32)) if name in module else None for name in NAMES)
    assert a is not None
    assert b is not None
    return Update(a.T.copy(), b.T.copy(), module.lora_scale, m)


def merge_adapter(module: Any) -> Any:
    """See the protocol's `merge_adapter`."""
    if experts.parts(module):
        return adapted_experts.merge_adapter(module)
    if isinstance(module, CONVERTED):
        layer = module.pack(module.merged(), module.get("bias"))
        layer.train(module.training)
        return layer
    layer = become(module, FakeLinear)
    for name in (*NAMES, "lora_scale"):
        layer.pop(name, None)
        layer.__dict__.pop(name, None)
    layer.weight = module.merged()
    layer.train(module.training)
    return layer


def train_only_adapters(model: nn.Module) -> None:
    """See the protocol's `train_only_adapters`."""
    model.freeze()
    for module in model.modules():
        if isinstance(module, (_Adapted, adapted_experts.AdaptedStack)):
            frozen_names(module).difference_update(NAMES)
