"""Prepared layers: train with the values to be deployed, evaluate with the deployed layer itself. Modules only."""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, cast

import mlx.core as mx
import mlx.nn as nn

from qkit.backend import Mode
from qkit.errors import StageError
from qkit.grid import Grid
from qkit.recipe import Rule
from qkit.static import static_names
from qkit_mlx import ops
from qkit_mlx.deployed import (
    DeployedEmbedding,
    DeployedLinear,
    PackedEmbedding,
    PackedLinear,
    deploy_embedding,
    deploy_linear,
)
from qkit_mlx.exact import RANGES, Exact
from qkit_mlx.static import averaged, given, scales_of, unseen, widened

Gate = bool | mx.array  #: whether quantization is on: an array where a function is traced


def switch(layer: Any, mode: Mode) -> None:
    """See `Backend.switch`."""
    layer._gate = mx.array(mode != "off")
    layer.calibrating = mode == "calibrating"


def forget(layer: Any) -> None:
    """See `Backend.forget`."""
    for name in RANGES:
        if name in layer:
            layer[name] = unseen()


def mode_of(layer: Any) -> Mode:
    """How `switch` left a layer."""
    if layer.calibrating:
        return "calibrating"
    return "on" if layer["_gate"].item() else "off"


def switched_on(layer: Any) -> Gate:
    """The gate of a layer: a bool, so that one branch is computed; or where that cannot be known yet, the array."""
    gate: mx.array = layer["_gate"]
    try:
        return bool(gate.item())
    except ValueError:  # MLX evaluates nothing while it traces
        return gate


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
        on = switched_on(self)
        parameters = [self[name] for name in ("weight", "bias") if name in self]
        if self.training or self.calibrating or on is False:
            return self._forward(on, x, *parameters)
        return _answer(partial(self._deployed, on), partial(self._forward, on), x, *parameters)

    def _forward(self, on: Gate, x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
        x = self._on_grid(on, x, self.rule.activation, "input")
        w = _weight(on, weight, self.rule)
        y = x @ w.T if bias is None else mx.addmm(bias, x, w.T)
        return self._on_grid(on, y, self.rule.output, "output")

    def _on_grid(self, on: Gate, x: mx.array, grid: Grid | None, name: str) -> mx.array:
        if grid is None or on is False:
            return x
        if self.calibrating:
            self._record(name, x)
            return x
        stored: dict[str, mx.array] = {}
        if self.rule.range != "dynamic":
            if self.rule.range == "average" and self.training:
                known = self[f"{name}_range"]
                self[f"{name}_range"] = _choose(on, averaged(known, x), known)
            stored = scales_of(self[f"{name}_range"], grid, name=name)
        return _choose(on, ops.fake_quantize(x, grid, ste=self.rule.ste, **given(stored, grid, name=name)), x)

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

    def _deployed(self, on: Gate, x: mx.array, *parameters: mx.array) -> mx.array:
        answer = self._deploy(*parameters)(x)
        return answer if on is True else mx.where(on, answer, self._forward(False, x, *parameters))

    def _deploy(self, weight: mx.array, bias: mx.array | None = None) -> DeployedLinear | PackedLinear:
        static: dict[str, mx.array] = {}
        for name, grid in static_names(self.rule).items():
            static |= scales_of(self[f"{name}_range"], grid, name=name)
        return deploy_linear(ops.quantize(weight, self.rule.weight), self.rule, bias=bias, static=static)

    @property
    def _no_grad(self) -> set[str]:
        """Names of what is frozen. Ranges always are: MLX unfreezes a model without asking the modules in it."""
        self._frozen.update(name for name in RANGES if name in self)
        return self._frozen

    @_no_grad.setter
    def _no_grad(self, names: set[str]) -> None:
        self._frozen = names

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
        on = switched_on(self)

        def forward(weight: mx.array) -> mx.array:
            return _weight(on, weight, self.rule)[x]

        def deployed(weight: mx.array) -> mx.array:
            answer = self._deploy(weight)(x)
            return answer if on is True else mx.where(on, answer, weight[x])

        if self.training or on is False:
            return forward(self["weight"])
        return _answer(deployed, forward, self["weight"])

    def as_linear(self, x: mx.array) -> mx.array:
        """The output head of a tied model: x [..., width] -> [..., entries]."""
        on = switched_on(self)

        def forward(x: mx.array, weight: mx.array) -> mx.array:
            return x @ _weight(on, weight, self.rule).T

        def deployed(x: mx.array, weight: mx.array) -> mx.array:
            answer = self._deploy(weight).as_linear(x)
            return answer if on is True else mx.where(on, answer, x @ weight.T)

        if self.training or on is False:
            return forward(x, self["weight"])
        return _answer(deployed, forward, x, self["weight"])

    def _deploy(self, weight: mx.array) -> DeployedEmbedding | PackedEmbedding:
        return deploy_embedding(ops.quantize(weight, self.rule.weight), self.rule)

    def to_quantized(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses: `nn.quantize` would move the weight off the grid it was trained on."""
        _refuse(self.rule)


def _adopt(fake: Any, layer: nn.Module, rule: Rule) -> None:
    for name in ("weight", "bias"):
        if name in layer:
            fake[name] = layer[name]
    fake.rule = rule
    fake._gate = mx.array(True)  # no parameter, because of its name, but part of the state that compiled functions see
    fake.freeze(keys=list(layer._no_grad))
    fake.train(layer.training)


def _weight(on: Gate, weight: mx.array, rule: Rule) -> mx.array:
    if on is False:
        return weight
    return _choose(on, ops.fake_quantize(weight, cast(Grid, rule.weight), ste=rule.ste), weight)


def _choose(on: Gate, rounded: mx.array, x: mx.array) -> mx.array:
    return rounded if on is True else mx.where(on, rounded, x)


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
