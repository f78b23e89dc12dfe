"""Adapters on prepared and converted stacks of experts, which compute with the quantized merged weight of each expert."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qkit.errors import StageError
from qkit.fused import shares
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor, dtype_of
from qkit.reference.merged import Update
from qkit_mlx.arithmetic import rounding, stored
from qkit_mlx.arithmetic.merged import dithered, merged
from qkit_mlx.cache.values import LastValue
from qkit_mlx.kernels import choose
from qkit_mlx.layers import experts
from qkit_mlx.layers.become import become
from qkit_mlx.layers.converted_experts import (
    CONVERTED_STACKS,
    PackedSwitchLinear,
    PlainSwitchLinear,
    SwitchCodes,
    on_grid,
    pack_stack,
)
from qkit_mlx.layers.prepared import evaluate_packed
from qkit_mlx.layers.stacks import FakeSwitchLinear, share
from qkit_mlx.layers.straight_through import fake_quantize, fake_requantize
from qkit_mlx.layers.tunable import first_update

NAMES = (
    "lora_a",
    "lora_b",
    "m",
)  #: of the parameters: [experts, inputs, rank], [experts, rank, outputs], [experts, outputs]


class AdaptedStack(nn.Module):
    """The parameters of the adapters of all experts."""

    @property
    def adapter(self) -> str:
        """Kind and rank."""
        return f"{'dora' if 'm' in self else 'lora'}, rank {self['lora_a'].shape[-1]}"

    @property
    def factors(self) -> list[mx.array]:
        """The parameters that train."""
        return [self[name] for name in NAMES if name in self]

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """The merged stack on its grid, for mlx-lm's `fuse`.

        Raises:
            StageError: `dequantize`, which would move the weight off the grid.
        """
        if dequantize:
            raise StageError(
                "a stack on a grid is not fused into float: call qkit.merge(model), then qkit.unprepare(model)"
            )
        merged: nn.Module = in_place_of(self, _merged(self))
        return merged

    def merge_into(self, w: mx.array, dtype: DType, factors: list[mx.array]) -> mx.array:
        """The merged weight of base `w`, in `dtype`."""
        return merged(w, *factors, scale=self.lora_scale, dtype=dtype)


class AdaptedSwitchLinear(AdaptedStack, FakeSwitchLinear):
    """A prepared stack with adapters; `weight` is the base."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:  # type: ignore[override]
        """See `FakeSwitchLinear`."""
        base = self["weight"]
        self["weight"] = self.merged()  # only while the prepared stack computes with it
        try:
            return FakeSwitchLinear.__call__(self, x, indices, sorted_indices)
        finally:
            self["weight"] = base

    def merged(self) -> mx.array:
        """The merged weights [experts, outputs, inputs], in the type of the base."""
        return self.merge_into(self["weight"], dtype_of(self["weight"]), self.factors)

    def own_weight(self) -> mx.array:
        """The merged weights, for the partner that shares their tensor scales."""
        return self.merged()


class _AdaptedCodes(AdaptedStack, SwitchCodes):
    """A converted stack with adapters. Its codes are the base, which each call decodes for the experts that tokens chose.

    In evaluation the stack that a merge would create computes the output, as in prepared stacks.
    """

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """See `SwitchCodes`."""
        bias = [self["bias"]] if "bias" in self else []

        def run_prepared(x: mx.array) -> mx.array:
            rule = self.rule
            y = self.multiply_one_by_one(on_grid(self, x, rule.activation, "input", indices, rule.ste), indices)
            y = (y + mx.expand_dims(bias[0][indices], -2) if bias else y).astype(x.dtype)
            return on_grid(self, y, rule.output, "output", indices, rule.ste)

        def run_packed(x: mx.array) -> mx.array:
            answer: mx.array = self.pack()(x, indices, sorted_indices)
            return answer

        if self.training:
            return run_prepared(x)
        return evaluate_packed(self._with_factors(run_packed), self._with_factors(run_prepared), x, *self.factors)

    def _with_factors(self, run: Callable[[mx.array], mx.array]) -> Callable[..., mx.array]:
        """`run` as a function of the factors, too."""

        def call(x: mx.array, *factors: mx.array) -> mx.array:
            before = {name: self[name] for name in NAMES if name in self}
            for name, factor in zip(before, factors, strict=True):
                self[name] = factor
            try:
                return run(x)
            finally:
                for name, factor in before.items():
                    self[name] = factor

        return call

    def merged(self, expert: int) -> mx.array:
        """The merged weight [outputs, inputs] of one expert, in float32."""
        q = replace(self.unpack(expert), dtype="float32")
        base = dithered(q) if self.lora_dithered else rounding.dequantize(q)
        return self.merge_into(base, "float32", [one[expert] for one in self.factors])

    def values_of(self, expert: int) -> mx.array:
        """See `SwitchCodes.values_of`; of the merged weight, with the gradient straight through."""
        weight = self.merged(expert)
        if self.grid.read:
            values = fake_requantize(weight, self.unpack(expert), ste=self.rule.ste)
        else:
            values = fake_quantize(weight, self._grid, ste=self.rule.ste, peak=self._peak(expert, weight))
        return rounding.to_dtype(values, self.dtype).astype(mx.float32)

    def peak_of(self, expert: int) -> mx.array:
        """See `SwitchCodes.peak_of`; of the merged weight."""
        return mx.abs(mx.stop_gradient(self.merged(expert))).max()

    def codes(self, expert: int) -> QTensor[mx.array]:
        """The codes of the merged weight of one expert."""
        weight = self.merged(expert)
        if self.grid.read:
            return replace(stored.requantize(weight, self.unpack(expert)), dtype=self.dtype)
        peak = self._peak(expert, weight)
        return replace(choose.quantize(weight, self._grid, peak=peak), dtype=self.dtype)

    def pack(self) -> Any:
        """The converted stack, without adapters, with the codes of the merged weights."""
        static = {key: self[key] for key in STATIC if key in self}
        pieces = [self.codes(expert) for expert in range(self.num_experts)]
        return pack_stack(pieces, self.rule, experts=len(pieces), bias=self.get("bias"), static=static)

    @property
    def _grid(self) -> Grid:
        grid = self.rule.weight
        assert grid is not None
        return grid

    def _peak(self, expert: int, weight: mx.array) -> mx.array | None:
        partner = self.__dict__.get("partner")
        if partner is None or not shares(self.rule.weight):
            return None
        return mx.maximum(mx.abs(mx.stop_gradient(weight)).max(), partner.peak_of(expert)).astype(mx.float32)


class AdaptedPackedSwitch(_AdaptedCodes, PackedSwitchLinear):
    """A converted stack in one of MLX's containers, with adapters."""


class AdaptedPlainSwitch(_AdaptedCodes, PlainSwitchLinear):
    """A converted stack in plain arrays, with adapters."""


STATIC = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


def adapt(module: Any, updates: Mapping[str, Update]) -> nn.Module:
    """See `TrainsExperts.adapt_experts`."""
    made = {}
    for name, part in experts.parts(module).items():
        made[name] = _adapted(part, updates[name]) if name in updates else part
    return experts.with_parts(module, made)


def with_lora(part: Any, r: int, dropout: float, scale: float) -> Any:
    """A stack with LoRA inside of its grid, for mlx-lm's `linear_to_lora_layers`; see `Tunable.to_lora`."""
    return in_place_of(part, _adapted(part, first_update(part, r, dropout, scale)))


def in_place_of(part: Any, other: Any) -> Any:
    """`other`, which the partner of `part` knows instead."""
    if (partner := part.__dict__.get("partner")) is not None:
        share(partner, other)
    return other


def updates_of(module: Any) -> dict[str, Update]:
    """See `TrainsExperts.expert_updates`."""
    found = {}
    for name, part in experts.parts(module).items():
        if isinstance(part, AdaptedStack):
            a, b, m = (np.array(part[key].astype(mx.float32)) if key in part else None for key in NAMES)
            assert a is not None
            assert b is not None
            a, b = np.ascontiguousarray(a.swapaxes(1, 2)), np.ascontiguousarray(b.swapaxes(1, 2))
            found[name] = Update(a, b, part.lora_scale, m, getattr(part, "lora_dithered", False))
    return found


def merge_adapter(module: Any) -> nn.Module:
    """See `Adapts.merge_adapter`."""
    return experts.with_parts(module, {name: _merged(part) for name, part in experts.parts(module).items()})


def _adapted(part: Any, update: Update) -> Any:
    if isinstance(part, CONVERTED_STACKS):
        layer = become(part, AdaptedPackedSwitch if isinstance(part, PackedSwitchLinear) else AdaptedPlainSwitch)
        layer.lora_dithered = update.dithered
    else:
        layer = become(part, AdaptedSwitchLinear)
        layer.cached_values = LastValue()
    layer.freeze(recurse=False)
    layer.lora_a, layer.lora_b = (mx.array(np.ascontiguousarray(one.swapaxes(1, 2))) for one in (update.a, update.b))
    if update.magnitude is not None:
        layer.m = mx.array(update.magnitude)
    layer.lora_scale = update.scale
    return layer


def _merged(part: Any) -> Any:
    if isinstance(part, _AdaptedCodes):
        layer = part.pack()
        layer.train(part.training)
        return layer
    if not isinstance(part, AdaptedSwitchLinear):
        return part
    layer = become(part, FakeSwitchLinear)
    for name in (*NAMES, "lora_scale"):
        layer.pop(name, None)
        layer.__dict__.pop(name, None)
    layer["weight"] = part.merged()
    layer.train(part.training)
    return layer
