"""Adapters on the two halves of `kv_b_proj`, which compute with the quantized merged weight of both.

The half of the values has the factors. A half takes its rows of the whole, so that both have those that a merge stores.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qkit.qtensor import QTensor, dtype_of
from qkit.reference.merged import Update
from qkit_mlx.arithmetic import rounding, stored
from qkit_mlx.arithmetic.gains import gained, of_values
from qkit_mlx.arithmetic.merged import dithered, merged
from qkit_mlx.kernels import choose
from qkit_mlx.layers.become import become
from qkit_mlx.layers.latent import FakeHeads, Halves, PackedHeads, pack_halves, split_weight, unpack_halves, weight_of
from qkit_mlx.layers.prepared import GATES, evaluate_packed, quantizes
from qkit_mlx.layers.straight_through import fake_quantize, fake_requantize

FACTORS = ("lora_a", "lora_b", "m")  #: [latent, rank], [rank, outputs], [outputs]
GAINS = "lora_gains"
NAMES = (*FACTORS, GAINS)  #: of the parameters, all in the half of the values


class AdaptedHalf(nn.Module):
    """The common part of both halves of prepared and of converted layers.

    Attributes:
        partner: the other half; no part of the model at this place.
        transposed: whether it is `embed_q`.
    """

    partner: Any
    transposed: bool

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """As `FakeHeads`. In evaluation the half that a merge would create computes the output."""
        names = [name for name in NAMES if name in self.owner]

        def run_prepared(x: mx.array, *parameters: mx.array) -> mx.array:
            rows = self.rows_of(self.values_of(dict(zip(names, parameters, strict=True))))
            return multiplied(x, rows, along_rows=transpose != self.transposed)

        def run_packed(x: mx.array, *parameters: mx.array) -> mx.array:
            made = self.pack(dict(zip(names, parameters, strict=True)))
            answer: mx.array = (made.keys if self.transposed else made.values)(x, transpose)
            return answer

        parameters = [self.owner[name] for name in names]
        if self.training or not quantizes(self):
            return run_prepared(x, *parameters)
        return evaluate_packed(run_packed, run_prepared, x, *parameters)

    @property
    def owner(self) -> Any:
        """The half that has the parameters."""
        return self.partner if self.transposed else self

    @property
    def pair(self) -> Halves:
        """Both halves."""
        return Halves(self, self.partner) if self.transposed else Halves(self.partner, self)

    @property
    def adapter(self) -> str:
        """Kind and rank."""
        return f"{'dora' if 'm' in self.owner else 'lora'}, rank {self.owner['lora_a'].shape[1]}"

    def merge_into(self, w: mx.array, parameters: dict[str, mx.array], dtype: Any) -> mx.array:
        """The merged weight of base `w` [outputs, latent], in `dtype`."""
        factors = [parameters[name] for name in FACTORS if name in parameters]
        return merged(w, *factors, scale=self.owner.lora_scale, dtype=dtype)

    def rows_of(self, whole: mx.array) -> mx.array:
        """The rows of this half [heads, rows, latent] among those of both."""
        each = whole.reshape(self.count, -1, whole.shape[-1])
        return each[:, : self.nope] if self.transposed else each[:, self.nope :]

    @property
    def count(self) -> int:
        """The number of heads."""
        raise NotImplementedError

    @property
    def nope(self) -> int:
        """The rows of keys in a head."""
        raise NotImplementedError

    def values_of(self, parameters: dict[str, mx.array]) -> mx.array:
        """The values of the merged weight [outputs, latent], with the gradient straight through."""
        raise NotImplementedError

    def pack(self, parameters: dict[str, mx.array]) -> Halves:
        """The converted halves, without an adapter, with the codes of the merged weight."""
        raise NotImplementedError


class AdaptedHeads(AdaptedHalf, FakeHeads):
    """A prepared half of a layer with an adapter; `weight` is the base."""

    def merged(self, parameters: dict[str, mx.array]) -> mx.array:
        """The merged weight [outputs, latent], in the type of the base."""
        base = weight_of(self.pair)
        return self.merge_into(base, parameters, dtype_of(base))

    def values_of(self, parameters: dict[str, mx.array]) -> mx.array:
        """See `AdaptedHalf.values_of`; the merged weight itself where the layer is off."""
        weight = self.merged(parameters)
        return fake_quantize(weight, self.rule.weight, ste=self.rule.ste) if quantizes(self) else weight

    def pack(self, parameters: dict[str, mx.array]) -> Halves:
        """See `AdaptedHalf.pack`."""
        return pack_halves(self.pair, choose.quantize(self.merged(parameters), self.rule.weight), self.rule)

    @property
    def count(self) -> int:
        """See `AdaptedHalf.count`."""
        return int(self["weight"].shape[0])

    @property
    def nope(self) -> int:
        """See `AdaptedHalf.nope`."""
        return int(self.pair.keys["weight"].shape[-1])


class AdaptedPackedHeads(AdaptedHalf, PackedHeads):
    """A converted half of a layer with an adapter. The codes of both halves are the base, which each call decodes."""

    calibrating = False

    def values_of(self, parameters: dict[str, mx.array]) -> mx.array:
        """See `AdaptedHalf.values_of`; where the layer is off, the merged weight of decoded codes."""
        q, gains = replace(unpack_halves(self.pair), dtype="float32"), parameters.get(GAINS)
        if not quantizes(self):
            base = rounding.dequantize(q)
            return self.merge_into(base if gains is None else _scaled(base, gains, lambda _: q), parameters, "float32")
        weight = self.merge_into(self._base(q), parameters, "float32")
        if gains is not None:
            values = _scaled(weight, gains, self._codes)
        elif self.grid.read:
            values = fake_requantize(weight, q, ste=self.rule.ste)
        else:
            values = fake_quantize(weight, self.grid, ste=self.rule.ste)
        return rounding.to_dtype(values, self.dtype).astype(mx.float32)

    def pack(self, parameters: dict[str, mx.array]) -> Halves:
        """See `AdaptedHalf.pack`."""
        base = self._base(replace(unpack_halves(self.pair), dtype="float32"))
        q = self._codes(self.merge_into(base, parameters, "float32"))
        q = gained(q, parameters[GAINS]) if GAINS in parameters else q
        return pack_halves(self.pair, replace(q, dtype=self.dtype), self.rule)

    @property
    def count(self) -> int:
        """See `AdaptedHalf.count`."""
        return int(self.heads)

    @property
    def nope(self) -> int:
        """See `AdaptedHalf.nope`."""
        return int(self.pair.keys.rows)

    def _base(self, q: QTensor[mx.array]) -> mx.array:
        return dithered(q) if self.owner.lora_dithered else rounding.dequantize(q)

    def _codes(self, weight: mx.array) -> QTensor[mx.array]:
        """The codes of `weight`, before its scales are multiplied with gains."""
        if self.grid.read:
            return stored.requantize(weight, unpack_halves(self.pair))
        return rounding.quantize(weight, self.grid)  # evaluates nothing while MLX follows a gradient


def multiplied(x: mx.array, rows: mx.array, *, along_rows: bool) -> mx.array:
    """`x` times the rows of each head, or their columns, in the wider of both types; in the type of `x`."""
    return (x @ (rows.swapaxes(-1, -2) if along_rows else rows)).astype(x.dtype)


def adapt(halves: Halves, update: Update) -> Halves:
    """See the protocol's `adapt`."""
    packed = isinstance(halves.keys, PackedHeads)
    keys, values = (
        become(half, AdaptedPackedHeads if packed else AdaptedHeads) for half in (halves.keys, halves.values)
    )
    for half, partner, transposed in ((keys, values, True), (values, keys, False)):
        half.__dict__.update(partner=partner, transposed=transposed)
        half.freeze(recurse=False)
        if packed:
            half["_gate"] = mx.zeros((), GATES[True])
    values.lora_a, values.lora_b = mx.array(update.a.T), mx.array(update.b.T)
    for name, array in (("m", update.magnitude), (GAINS, update.gains)):
        if array is not None:
            values[name] = mx.array(array)
    values.lora_scale, values.lora_dithered = update.scale, update.dithered
    return Halves(keys, values)


def adapter_update(halves: Halves) -> Update:
    """See the protocol's `adapter_update`."""
    own = halves.values
    a, b, m, gains = (np.array(own[name].astype(mx.float32)) if name in own else None for name in NAMES)
    assert a is not None
    assert b is not None
    return Update(a.T.copy(), b.T.copy(), own.lora_scale, m, own.lora_dithered, gains)


def merge_adapter(halves: Halves) -> Halves:
    """See the protocol's `merge_adapter`."""
    own = halves.values
    parameters = {name: own[name] for name in NAMES if name in own}
    if isinstance(own, AdaptedPackedHeads):
        return own.pack(parameters)
    weights = split_weight(own.merged(parameters), halves)
    made = [become(half, FakeHeads) for half in (halves.keys, own)]
    for half, partner, weight in zip(made, made[::-1], weights, strict=True):
        for name in (*NAMES, "lora_scale", "lora_dithered"):
            half.pop(name, None)
            half.__dict__.pop(name, None)
        half.__dict__["partner"] = partner
        half["weight"] = weight
        half.train(half.training)
    return Halves(*made)


def _scaled(weight: mx.array, gains: mx.array, codes: Callable[[mx.array], QTensor[mx.array]]) -> mx.array:
    """The values of the codes of `weight`, with gains, in float32; the gradient passes straight through to the weight."""

    def forward(weight: mx.array, gains: mx.array) -> mx.array:
        q = codes(mx.stop_gradient(weight))
        return rounding.dequantize(gained(replace(q, dtype="float32"), mx.stop_gradient(gains)))

    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        weight, gains = primals
        return cotangent, of_values(cotangent, codes(weight), gains).astype(gains.dtype)

    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    made: mx.array = function(weight, gains)
    return made
