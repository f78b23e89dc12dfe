"""Adapters on prepared and converted layers. The layers compute with the quantized merged weight, and merge into it.

`qkit.reference.merged` is the law of the merged weight. Eager and compiled layers follow it exactly.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qkit.errors import StageError
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor, dtype_of
from qkit.reference.merged import Update
from qkit_mlx.arithmetic import rounding, stored
from qkit_mlx.arithmetic.gains import gained
from qkit_mlx.arithmetic.merged import dithered, merged
from qkit_mlx.arithmetic.ranges import stored_scales
from qkit_mlx.cache.values import LastValue
from qkit_mlx.kernels import choose
from qkit_mlx.layers import adapted_experts, adapted_latent, experts, fused
from qkit_mlx.layers.adapted_product import Merging, multiply
from qkit_mlx.layers.become import become
from qkit_mlx.layers.converted import CONVERTED, STORED, PackedLinear, PlainLinear, pack_linear, unpack
from qkit_mlx.layers.latent import Halves
from qkit_mlx.layers.prepared import GATES, FakeLinear, evaluate_packed, quantizes
from qkit_mlx.layers.straight_through import fake_quantize
from qkit_mlx.mlx_private import frozen_names

FACTORS = ("lora_a", "lora_b", "m")  #: names of the parameters that the merged weight follows from
GAINS = "lora_gains"
NAMES = (*FACTORS, GAINS)  #: of the parameters of an adapter
CODES = ("weight", "scales", "biases", "zeros", "tensor_scale")  #: of the arrays of a converted base


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

    @property
    def factors(self) -> list[mx.array]:
        """A, B and, of DoRA, the magnitudes."""
        return [self[name] for name in FACTORS if name in self]

    def merge_into(self, w: mx.array, dtype: DType) -> mx.array:
        """The merged weight of base `w` [outputs, inputs], in `dtype`."""
        return merged(w, *self.factors, scale=self.lora_scale, dtype=dtype)


class AdaptedLinear(_Adapted, FakeLinear):
    """A prepared layer with an adapter; `weight` is the base."""

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., inputs] -> [..., outputs]."""
        if self.training and not self.calibrating and x.size and "weight" in frozen_names(self):
            y = multiply(
                self._on_grid(x, self.rule.activation, "input"), self.factors, self.get("bias"), self._merging()
            )
            return self._on_grid(y, self.rule.output, "output")
        base = self["weight"]
        self["weight"] = self.merged()  # only while the prepared layer computes with it
        try:
            return FakeLinear.__call__(self, x)
        finally:
            self["weight"] = base

    def _merging(self) -> Merging:
        def on_grid(merged: mx.array) -> mx.array:
            return fake_quantize(merged, grid, peak=fused.peak(self, merged)) if on else merged

        def unclipped(merged: mx.array) -> mx.array:
            return rounding.unclipped(merged, grid, peak=fused.peak(self, merged))

        grid, on = self.rule.weight, quantizes(self)
        return Merging(
            self, ["weight"], lambda _: self["weight"], self.lora_scale, dtype_of(self["weight"]),
            self.rule.ste if on else "identity", not on or (grid is not None and grid.by_rows), on_grid, unclipped,
        )  # fmt: skip

    def merged(self) -> mx.array:
        """The merged weight [outputs, inputs], in the type of the base."""
        return self.merge_into(self["weight"], dtype_of(self["weight"]))


class _AdaptedConverted(_Adapted):
    """A converted layer with an adapter. Its codes are the base, which each call decodes.

    In evaluation the layer that a merge would create computes the output, as in prepared layers.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., inputs] -> [..., outputs]."""
        if self.training or not quantizes(self):
            return self._run_prepared(x)
        parameters = [self[name] for name in (*NAMES, "bias") if name in self]
        return evaluate_packed(
            self._with_parameters(self._run_packed), self._with_parameters(self._run_prepared), x, *parameters
        )

    def merged(self) -> mx.array:
        """The merged weight [outputs, inputs] that the grid rounds, in float32."""
        return self.merge_into(self.base(), "float32")

    def base(self, first: int = 0) -> mx.array:
        """The decoded base from row `first` on, in float32; spread within its cells, if the adapter wants it so."""
        q = replace(unpack(self), dtype="float32")
        return dithered(q, first=first) if self.lora_dithered else rounding.dequantize(q)

    def pack(self, weight: mx.array, bias: mx.array | None = None) -> PackedLinear | PlainLinear:
        """The converted layer, without an adapter, with the codes of `weight`."""
        q = self._codes(weight, choose.quantize)
        q = replace(gained(q, self[GAINS]) if GAINS in self else q, dtype=self.dtype)
        static = {name: self[name] for name in STORED if name in self and name not in ("bias", *NAMES)}
        return pack_linear(q, self.rule, bias=bias, static=static)

    def _run_prepared(self, x: mx.array) -> mx.array:
        if not x.size:  # a layer that no token reaches
            return self._run_packed(x)
        x, merging = self._on_grid(x, self.rule.activation, "input"), self._merging()
        y = multiply(x, self.factors, self.get("bias"), merging, gains=self.get(GAINS))
        return self._on_grid(y, self.rule.output, "output")

    def _codes(
        self, weight: mx.array, quantize: Callable[..., QTensor[mx.array]] = rounding.quantize
    ) -> QTensor[mx.array]:
        """The codes of `weight`, before its scales are multiplied with gains. `rounding.quantize` evaluates nothing.

        MLX keeps every array that is evaluated while it follows a gradient.
        """
        if self.grid.read:
            return stored.requantize(weight, unpack(self))
        return quantize(weight, self.rule.weight, peak=fused.peak(self, weight))

    def _run_packed(self, x: mx.array) -> mx.array:
        return self.pack(self.merged(), self.get("bias"))(x)

    def _with_parameters(self, run: Callable[[mx.array], mx.array]) -> Callable[..., mx.array]:
        """`run` as a function of the parameters, too."""

        def function(x: mx.array, *parameters: mx.array) -> mx.array:
            names = [name for name in (*NAMES, "bias") if name in self]
            before = [self[name] for name in names]
            try:
                self.update(dict(zip(names, parameters, strict=True)))
                return run(x)
            finally:
                self.update(dict(zip(names, before, strict=True)))

        return function

    def _merging(self) -> Merging:
        def decoded(_: int, *gains: mx.array) -> mx.array:
            q = replace(unpack(self), dtype="float32")
            return rounding.dequantize(gained(q, *gains) if gains else q)

        def on_grid(merged: mx.array, *gains: mx.array) -> mx.array:
            if gains:
                finite = mx.isfinite(merged)
                q = self._codes(mx.where(finite, merged, 0.0))
                return mx.where(finite, rounding.dequantize(gained(replace(q, dtype="float32"), *gains)), mx.nan)
            if grid.read:
                return stored.fake_requantize(merged, unpack(self))
            return fake_quantize(merged, grid, peak=fused.peak(self, merged))

        def unclipped(merged: mx.array) -> mx.array:
            if grid.read:
                return stored.unclipped(merged, unpack(self))
            return rounding.unclipped(merged, grid, peak=fused.peak(self, merged))

        def base(first: int, *_: mx.array) -> mx.array:
            return self.base(first)

        grid = self.grid
        if not quantizes(self):
            return Merging(
                self, CODES, decoded, self.lora_scale, "float32", "identity", True, lambda merged, *_: merged, unclipped,
                lambda _: unpack(self),
            )  # fmt: skip
        return Merging(
            self, CODES, base, self.lora_scale, "float32", self.rule.ste, grid.by_rows, on_grid, unclipped,
            self._codes,
        )  # fmt: skip

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
    if isinstance(module, Halves):
        return adapted_latent.adapt(module, update)
    if isinstance(module, CONVERTED):
        layer = become(module, AdaptedPacked if isinstance(module, PackedLinear) else AdaptedPlain)
        layer.cached_peak = LastValue()
        layer.lora_dithered, layer["_gate"] = update.dithered, mx.zeros((), GATES[True])
        layer.calibrating = False
    else:
        layer = become(module, AdaptedLinear)
    layer.freeze(recurse=False)
    layer.lora_a, layer.lora_b = mx.array(update.a.T), mx.array(update.b.T)
    if update.magnitude is not None:
        layer.m = mx.array(update.magnitude)
    if update.gains is not None:
        layer[GAINS] = mx.array(update.gains)
    layer.lora_scale = update.scale
    return layer


def adapter_update(module: Any) -> Update:
    """See the protocol's `adapter_update`."""
    if isinstance(module, Halves):
        return adapted_latent.adapter_update(module)
    a, b, m, gains = (np.array(module[name].astype(mx.float32)) if name in module else None for name in NAMES)
    assert a is not None
    assert b is not None
    return Update(a.T.copy(), b.T.copy(), module.lora_scale, m, getattr(module, "lora_dithered", False), gains)


def merge_adapter(module: Any) -> Any:
    """See the protocol's `merge_adapter`."""
    if isinstance(module, Halves):
        return adapted_latent.merge_adapter(module)
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
        if isinstance(module, (_Adapted, adapted_experts.AdaptedStack, adapted_latent.AdaptedHalf)):
            frozen_names(module).difference_update(NAMES)
