"""Prepared layers: they train with the values of their grid, and evaluate with the converted layer itself. Modules only."""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, cast

import mlx.core as mx
import mlx.nn as nn

from qkit.engines.layer import Mode
from qkit.errors import StageError
from qkit.grid import Grid
from qkit.reference.ranges import static_names
from qkit.rules import Rule
from qkit_mlx.arithmetic import ranges
from qkit_mlx.cache.values import LastValue
from qkit_mlx.kernels import choose
from qkit_mlx.layers import fused
from qkit_mlx.layers.converted import (
    PackedEmbedding,
    PackedLinear,
    PlainEmbedding,
    PlainLinear,
    pack_embedding,
    pack_linear,
)
from qkit_mlx.layers.float32_scales import RANGES, Float32Scales
from qkit_mlx.layers.straight_through import fake_quantize, values_view
from qkit_mlx.layers.tunable import Readable, Tunable
from qkit_mlx.mlx_private import frozen_names

#: The type of a layer's `_gate`, by whether the layer quantizes. Compiled functions take the model's state as an input, and
#: compile once more for another type. A choice by the value of an array would cost time for each weight and step.
GATES = {True: mx.bool_, False: mx.uint8}

RULE_NUMBERS: dict[Rule, int] = {}  #: of the rules that `regrid` has given to layers

#: The last quantized input, for other layers that read the same array: queries, keys and values; gate and up.
LAST_INPUT: LastValue[mx.array] = LastValue()


def switch_mode(layer: Any, mode: Mode) -> None:
    """See the protocol's `switch_mode`."""
    layer["_gate"] = mx.zeros(layer["_gate"].shape, GATES[mode != "off"])
    layer.calibrating = mode == "calibrating"


def freeze_values(layer: Any, on: bool) -> None:
    """See the protocol's `freeze_values`. Frozen values are in the model's state, for compiled functions, but no parameter."""
    layer.pop("_frozen_values", None)
    if on:
        layer["_frozen_values"] = layer.quantized(layer["weight"], peak=layer.shared_peak(layer["weight"]))
        mx.eval(layer["_frozen_values"])


def regrid(layer: Any, rule: Rule) -> None:
    """See the protocol's `regrid`. The gate gets another shape for each rule, which compiled functions see."""
    layer.rule = rule
    layer["_gate"] = mx.zeros((RULE_NUMBERS.setdefault(rule, len(RULE_NUMBERS) + 1),), layer["_gate"].dtype)
    if "_frozen_values" in layer:
        freeze_values(layer, on=True)


def clear_ranges(layer: Any) -> None:
    """See the protocol's `clear_ranges`."""
    for name in RANGES:
        if name in layer:
            layer[name] = mx.broadcast_to(mx.array(ranges.EMPTY), layer[name].shape)


def mode_of(layer: Any) -> Mode:
    """The mode that `switch_mode` set last."""
    if layer.calibrating:
        return "calibrating"
    return "on" if quantizes(layer) else "off"


def quantizes(layer: Any) -> bool:
    """Whether the mode of a layer is another than "off"."""
    return bool(layer["_gate"].dtype == GATES[True])


class FakeLinear(Tunable, Readable, Float32Scales, nn.Linear):
    """A linear layer with a fake-quantized weight, and input and output if the rule has grids. `weight` is the master weight.

    The weight that it multiplies with:

    ==============  ==============  ========================================================
    mode            layer is        multiplies with
    ==============  ==============  ========================================================
    off             in either       the master weight
    on              training        quantized values, cached until the weight changes, or frozen
    calibrating     in either       the same; inputs and outputs are recorded, not quantized
    on              in evaluation   the codes of the converted layer, packed anew at each call
    ==============  ==============  ========================================================

    Prepared and converted layers therefore agree to the bit in evaluation. Evaluation does not cache the converted layer, since
    an edit in place leaves no trace on an array. Gradients are those of training in either.

    Stores `input_range` and `output_range` if they are static. `calibrating` is a plain attribute: functions that were compiled
    before do not record. The range stays empty then, which gives NaN.
    """

    calibrating = False

    def __init__(self, layer: nn.Linear, rule: Rule) -> None:
        nn.Module.__init__(self)  # not Linear's, which draws a random weight
        _adopt(self, layer, rule)
        for name in static_names(rule):
            self[f"{name}_range"] = mx.array(ranges.EMPTY)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., inputs] -> [..., outputs]."""
        parameters = [self[name] for name in ("weight", "bias") if name in self]
        if self.training or self.calibrating or not quantizes(self):
            return self._run_prepared(x, *parameters)
        return evaluate_packed(self._run_packed, self._run_prepared, x, *parameters)

    def shared_peak(self, weight: mx.array) -> mx.array | None:
        """The largest magnitude of all weights that share a tensor scale, of which `weight` is one; None if none do."""
        return fused.peak(self, weight)

    def quantized(self, weight: mx.array, *, peak: mx.array | None) -> mx.array:
        """The values of `weight` on its grid, computed anew."""
        return choose.fake_quantize_weight(weight, self.rule.weight, peak=peak)

    def _run_prepared(self, x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
        x = self._on_grid(x, self.rule.activation, "input")
        w = values_of(self, weight)
        y = x @ w.T if bias is None else mx.addmm(bias, x, w.T)
        return self._on_grid(y, self.rule.output, "output")

    def own_weight(self) -> mx.array:
        """The weight whose values the layer computes with."""
        weight: mx.array = self["weight"]
        return weight

    def _run_packed(self, x: mx.array, *parameters: mx.array) -> mx.array:
        return self._pack(*parameters)(x)

    def _pack(self, weight: mx.array, bias: mx.array | None = None) -> PackedLinear | PlainLinear:
        q = choose.quantize(weight, self.rule.weight, peak=fused.peak(self, weight))
        return pack_linear(q, self.rule, bias=bias, static=self._static())

    def _on_grid(self, x: mx.array, grid: Grid | None, name: str) -> mx.array:
        if grid is None or not quantizes(self):
            return x
        if self.calibrating:
            self._record(name, x)
            return x
        if self.rule.range == "dynamic":
            rounded = partial(fake_quantize, grid=grid, ste=self.rule.ste)
            return LAST_INPUT.of(x, rounded, grid, self.rule.ste) if name == "input" and x.size else rounded(x)
        if self.rule.range == "average" and self.training and x.size:
            self[f"{name}_range"] = ranges.averaged(self[f"{name}_range"], ranges.extremes(x))
        stored = ranges.static_scales(self[f"{name}_range"], grid, name=name)
        return fake_quantize(x, grid, ste=self.rule.ste, **ranges.stored_scales(stored, grid, name=name))

    def _record(self, name: str, x: mx.array) -> None:
        if self.rule.range == "dynamic" or not x.size:
            return
        seen = ranges.wider(self[f"{name}_range"], ranges.extremes(x))
        try:
            mx.eval(seen)  # also releases the graph that computes it
        except ValueError:
            raise StageError(
                "ranges cannot be recorded while a function is compiled: calibrate the model itself"
            ) from None
        self[f"{name}_range"] = seen

    def _static(self) -> dict[str, mx.array]:
        static: dict[str, mx.array] = {}
        for name, grid in static_names(self.rule).items():
            static |= ranges.static_scales(self[f"{name}_range"], grid, name=name)
        return static

    @property
    def _no_grad(self) -> set[str]:
        """Names of frozen arrays. Ranges always are frozen: MLX unfreezes a model without a call to its modules."""
        self._frozen.update(name for name in RANGES if name in self)
        return self._frozen

    @_no_grad.setter
    def _no_grad(self, names: set[str]) -> None:
        self._frozen = names

    def _set_training_mode(self, mode: bool) -> None:
        super()._set_training_mode(mode)
        self.cached_values: LastValue[mx.array] = LastValue()
        self.cached_peak: LastValue[mx.array] = LastValue()

    def to_quantized(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses: `nn.quantize` would move the weight off the grid that it was trained on."""
        _refuse(self.rule)


class FakeEmbedding(Readable, nn.Embedding):
    """An embedding with a fake-quantized weight, also as the output head of a tied model. Otherwise as `FakeLinear`."""

    calibrating = False

    def __init__(self, layer: nn.Embedding, rule: Rule) -> None:
        nn.Module.__init__(self)  # not Embedding's, which draws a random weight
        _adopt(self, layer, rule)

    def __call__(self, x: mx.array) -> mx.array:
        """Row numbers x [...] -> [..., width]."""

        def run_prepared(weight: mx.array) -> mx.array:
            return values_of(self, weight)[x]

        def run_packed(weight: mx.array) -> mx.array:
            return self._pack(weight)(x)

        if self.training or not quantizes(self):
            return run_prepared(self["weight"])
        return evaluate_packed(run_packed, run_prepared, self["weight"])

    def as_linear(self, x: mx.array) -> mx.array:
        """The output head of a tied model: x [..., width] -> [..., entries]."""

        def run_prepared(x: mx.array, weight: mx.array) -> mx.array:
            return x @ values_of(self, weight).T

        def run_packed(x: mx.array, weight: mx.array) -> mx.array:
            return self._pack(weight).as_linear(x)

        if self.training or not quantizes(self):
            return run_prepared(x, self["weight"])
        return evaluate_packed(run_packed, run_prepared, x, self["weight"])

    def shared_peak(self, weight: mx.array) -> mx.array | None:
        """The largest magnitude of all weights that share a tensor scale, of which `weight` is one; None if none do."""
        return fused.peak(self, weight)

    def quantized(self, weight: mx.array, *, peak: mx.array | None) -> mx.array:
        """The values of `weight` on its grid, computed anew."""
        return choose.fake_quantize_weight(weight, self.rule.weight, peak=peak)

    def _pack(self, weight: mx.array) -> PackedEmbedding | PlainEmbedding:
        return pack_embedding(choose.quantize(weight, self.rule.weight), self.rule)

    def _set_training_mode(self, mode: bool) -> None:
        super()._set_training_mode(mode)
        self.cached_values: LastValue[mx.array] = LastValue()
        self.cached_peak: LastValue[mx.array] = LastValue()

    def to_quantized(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses: `nn.quantize` would move the weight off the grid that it was trained on."""
        _refuse(self.rule)


def evaluate_packed(
    run_packed: Callable[..., mx.array], run_prepared: Callable[..., mx.array], *inputs: mx.array
) -> mx.array:
    """`run_packed(*inputs)`, with the gradients of `run_prepared(*inputs)`: a loop without `model.train()` trains too."""
    function: Any = mx.custom_function(run_packed)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        several = isinstance(primals, (tuple, list))
        primals = list(primals) if several else [primals]
        gradients = mx.vjp(lambda *inputs: run_prepared(*inputs).astype(cotangent.dtype), primals, [cotangent])[1]
        return tuple(gradients) if several else gradients[0]

    answer: mx.array = function(*inputs)
    return answer


def values_of(layer: Any, weight: mx.array) -> mx.array:
    """The values that a layer multiplies with: computed once for each state of the weight, not for each part of a batch."""
    if not quantizes(layer):
        return weight
    grid, ste, peak = cast(Grid, layer.rule.weight), layer.rule.ste, layer.shared_peak(weight)
    if layer.training and "_frozen_values" in layer:
        return values_view(weight, layer["_frozen_values"].astype(weight.dtype), grid, ste=ste, peak=peak)
    values = layer.cached_values.of(weight, partial(layer.quantized, peak=peak), grid, peak, traced=True)
    return values_view(weight, values, grid, ste=ste, peak=peak)


def _adopt(prepared: Any, layer: nn.Module, rule: Rule) -> None:
    for name in ("weight", "bias"):
        if name in layer:
            prepared[name] = layer[name]
    prepared.rule = rule
    prepared["_gate"] = mx.zeros(
        (), GATES[True]
    )  # no parameter, because of its name, but in the state of compiled functions
    prepared.freeze(keys=list(frozen_names(layer)))
    prepared.train(layer.training)  # which also creates `cached_values`


def _refuse(rule: Rule) -> NoReturn:
    raise StageError(f"mlx.nn.quantize would undo the training on {rule.weight}: call qkit.convert(model) instead")
