"""Prepared layers: train with the values to be deployed, evaluate with the deployed layer itself. Modules only."""

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
from qkit_mlx.arithmetic import rounding
from qkit_mlx.arithmetic.ranges import averaged, given, scales_of, unseen, widened
from qkit_mlx.cache.values import Once
from qkit_mlx.kernels import cpu
from qkit_mlx.layers.converted import (
    DeployedEmbedding,
    DeployedLinear,
    PackedEmbedding,
    PackedLinear,
    deploy_embedding,
    deploy_linear,
)
from qkit_mlx.layers.exact import RANGES, Exact
from qkit_mlx.layers.straight_through import straight_through

#: Whether quantization is on, by the type of a layer's `_gate`: functions that are compiled with the model's state see another
#: type as another input, and compile each once; an array that only held another value would cost a choice per weight and step.
GATES = {True: mx.bool_, False: mx.uint8}

RULES: dict[Rule, int] = {}  #: numbers of the rules that layers were given in place

#: The last layer's input on its grid, with its gradient, for others that read the same: queries, keys and values; gate and up.
INPUT: Once[mx.array] = Once()


def switch(layer: Any, mode: Mode) -> None:
    """See `Backend.switch`."""
    layer._gate = mx.zeros(layer["_gate"].shape, GATES[mode != "off"])
    layer.calibrating = mode == "calibrating"


def hold(layer: Any, on: bool) -> None:
    """See `Backend.hold`. What is held is part of the model's state, which compiled functions see; by its name, no parameter."""
    layer.pop("_held", None)
    if on:
        layer._held = weight_on_grid(layer["weight"], layer.rule.weight)
        mx.eval(layer._held)


def regrid(layer: Any, rule: Rule) -> None:
    """See `Backend.regrid`. Compiled functions see the shape of the gate, which is another for each rule."""
    layer.rule = rule
    layer._gate = mx.zeros((RULES.setdefault(rule, len(RULES) + 1),), layer["_gate"].dtype)
    if "_held" in layer:
        hold(layer, on=True)


def forget(layer: Any) -> None:
    """See `Backend.forget`."""
    for name in RANGES:
        if name in layer:
            layer[name] = unseen()


def mode_of(layer: Any) -> Mode:
    """How `switch` left a layer."""
    if layer.calibrating:
        return "calibrating"
    return "on" if switched_on(layer) else "off"


def switched_on(layer: Any) -> bool:
    """Whether a layer quantizes."""
    return bool(layer["_gate"].dtype == GATES[True])


def weight_on_grid(weight: mx.array, grid: Grid) -> mx.array:
    """`ops.round_to_grid` of a weight, which may be waited for. To wait for an activation would keep all that it was made of."""
    weight = mx.stop_gradient(weight)
    return cpu.round_to_grid(weight, grid) if cpu.takes(weight) else rounding.round_to_grid(weight, grid)


class FakeLinear(Exact, nn.Linear):
    """A linear layer whose weight, and input and output if the rule says so, are fake-quantized. The master stays `weight`.

    In evaluation mode the layer that `convert` would make answers, so that the two agree to the bit. It is made anew at
    every call: an array edited in place looks like the one it was. Gradients are those of training mode, in either.

    Stores `input_range` and `output_range` where they are static. `calibrating` is a plain attribute: functions that were
    compiled before do not record, and find an empty range, which gives NaN.
    """

    calibrating = False

    def __init__(self, layer: nn.Linear, rule: Rule) -> None:
        nn.Module.__init__(self)  # not Linear's: it would draw a random weight
        _adopt(self, layer, rule)
        for name in static_names(rule):
            self[f"{name}_range"] = unseen()

    def __call__(self, x: mx.array) -> mx.array:
        parameters = [self[name] for name in ("weight", "bias") if name in self]
        if self.training or self.calibrating or not switched_on(self):
            return self._forward(x, *parameters)
        return _answer(self._deployed, self._forward, x, *parameters)

    def _forward(self, x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
        x = self._on_grid(x, self.rule.activation, "input")
        w = _values(self, weight)
        y = x @ w.T if bias is None else mx.addmm(bias, x, w.T)
        return self._on_grid(y, self.rule.output, "output")

    def _on_grid(self, x: mx.array, grid: Grid | None, name: str) -> mx.array:
        if grid is None or not switched_on(self):
            return x
        if self.calibrating:
            self._record(name, x)
            return x
        if self.rule.range == "dynamic":
            quantize = partial(rounding.fake_quantize, grid=grid, ste=self.rule.ste)
            return INPUT.of(x, quantize, grid, self.rule.ste) if name == "input" and x.size else quantize(x)
        if self.rule.range == "average" and self.training:
            self[f"{name}_range"] = averaged(self[f"{name}_range"], x)
        stored = scales_of(self[f"{name}_range"], grid, name=name)
        return rounding.fake_quantize(x, grid, ste=self.rule.ste, **given(stored, grid, name=name))

    def _record(self, name: str, x: mx.array) -> None:
        if self.rule.range == "dynamic":
            return
        known = widened(self[f"{name}_range"], x)
        try:
            mx.eval(known)  # also lets go of all that it was computed from
        except ValueError:
            raise StageError(
                "ranges cannot be recorded while a function is compiled: calibrate the model itself"
            ) from None
        self[f"{name}_range"] = known

    def _deployed(self, x: mx.array, *parameters: mx.array) -> mx.array:
        return self._deploy(*parameters)(x)

    def _deploy(self, weight: mx.array, bias: mx.array | None = None) -> DeployedLinear | PackedLinear:
        return deploy_linear(rounding.quantize(weight, self.rule.weight), self.rule, bias=bias, static=self._static())

    def _static(self) -> dict[str, mx.array]:
        static: dict[str, mx.array] = {}
        for name, grid in static_names(self.rule).items():
            static |= scales_of(self[f"{name}_range"], grid, name=name)
        return static

    @property
    def _no_grad(self) -> set[str]:
        """Names of what is frozen. Ranges always are: MLX unfreezes a model without asking the modules in it."""
        self._frozen.update(name for name in RANGES if name in self)
        return self._frozen

    @_no_grad.setter
    def _no_grad(self, names: set[str]) -> None:
        self._frozen = names

    def _set_training_mode(self, mode: bool) -> None:
        super()._set_training_mode(mode)
        self.rounded: Once[mx.array] = Once()

    def to_quantized(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses: `nn.quantize` would move the weight off the grid it was trained on."""
        _refuse(self.rule)


class FakeEmbedding(nn.Embedding):
    """An embedding whose weight is fake-quantized, also where it is the output head. Otherwise as `FakeLinear`."""

    calibrating = False

    def __init__(self, layer: nn.Embedding, rule: Rule) -> None:
        nn.Module.__init__(self)  # not Embedding's: it would draw a random weight
        _adopt(self, layer, rule)

    def __call__(self, x: mx.array) -> mx.array:
        def forward(weight: mx.array) -> mx.array:
            return _values(self, weight)[x]

        def deployed(weight: mx.array) -> mx.array:
            return self._deploy(weight)(x)

        if self.training or not switched_on(self):
            return forward(self["weight"])
        return _answer(deployed, forward, self["weight"])

    def as_linear(self, x: mx.array) -> mx.array:
        """The output head of a tied model: x [..., width] -> [..., entries]."""

        def forward(x: mx.array, weight: mx.array) -> mx.array:
            return x @ _values(self, weight).T

        def deployed(x: mx.array, weight: mx.array) -> mx.array:
            return self._deploy(weight).as_linear(x)

        if self.training or not switched_on(self):
            return forward(x, self["weight"])
        return _answer(deployed, forward, x, self["weight"])

    def _deploy(self, weight: mx.array) -> DeployedEmbedding | PackedEmbedding:
        return deploy_embedding(rounding.quantize(weight, self.rule.weight), self.rule)

    def _set_training_mode(self, mode: bool) -> None:
        super()._set_training_mode(mode)
        self.rounded: Once[mx.array] = Once()

    def to_quantized(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses: `nn.quantize` would move the weight off the grid it was trained on."""
        _refuse(self.rule)


def _adopt(fake: Any, layer: nn.Module, rule: Rule) -> None:
    for name in ("weight", "bias"):
        if name in layer:
            fake[name] = layer[name]
    fake.rule = rule
    fake._gate = mx.zeros((), GATES[True])  # no parameter, because of its name, but compiled functions see it
    fake.freeze(keys=list(layer._no_grad))
    fake.train(layer.training)  # which gives it a new `rounded`


def _values(layer: Any, weight: mx.array) -> mx.array:
    """What a layer multiplies with: made anew when its weight is another, and not for every part of a batch."""
    if not switched_on(layer):
        return weight
    if layer.training and "_held" in layer:
        passes = None if layer.rule.ste == "identity" else partial(rounding.unclipped, grid=layer.rule.weight)
        return straight_through(weight, lambda _: layer["_held"].astype(weight.dtype), where=passes)
    grid = cast(Grid, layer.rule.weight)
    values = layer.rounded.of(weight, partial(weight_on_grid, grid=grid), grid, traced=True)
    passes = None if layer.rule.ste == "identity" else partial(rounding.unclipped, grid=grid)
    return straight_through(weight, lambda _: values, where=passes)


def _answer(deployed: Callable[..., mx.array], forward: Callable[..., mx.array], *inputs: mx.array) -> mx.array:
    """`deployed(*inputs)`, with the gradients of `forward(*inputs)`: a loop that forgot `model.train()` trains too."""
    function: Any = mx.custom_function(deployed)

    @function.vjp  # type: ignore[untyped-decorator]
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        several = isinstance(primals, (tuple, list))
        primals = list(primals) if several else [primals]
        gradients = mx.vjp(lambda *inputs: forward(*inputs).astype(cotangent.dtype), primals, [cotangent])[1]
        return tuple(gradients) if several else gradients[0]

    answer: mx.array = function(*inputs)
    return answer


def _refuse(rule: Rule) -> NoReturn:
    raise StageError(f"mlx.nn.quantize would undo the training on {rule.weight}: call qkit.convert(model) instead")
