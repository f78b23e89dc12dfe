"""Prepared layers: train with the values to be deployed, evaluate with the deployed layer itself. Modules only."""

from collections.abc import Callable
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn

from qkit.errors import StageError
from qkit.recipe import Rule
from qkit_mlx import ops
from qkit_mlx.deployed import (
    DeployedEmbedding,
    DeployedLinear,
    PackedEmbedding,
    PackedLinear,
    deploy_embedding,
    deploy_linear,
)


class FakeLinear(nn.Linear):
    """A linear layer whose weight, and input if the rule says so, is fake-quantized. The master weight stays `weight`.

    In evaluation mode the layer that `convert` would make answers, so that the two agree to the bit. It is made anew at
    every call: an array edited in place looks like the one it was. Gradients are those of training mode, in either.
    """

    def __init__(self, layer: nn.Linear, rule: Rule) -> None:
        nn.Module.__init__(self)  # not Linear's: it would draw a random weight
        _adopt(self, layer, rule)

    def __call__(self, x: mx.array) -> mx.array:
        parameters = [self[name] for name in ("weight", "bias") if name in self]
        if self.training:
            return self._forward(x, *parameters)
        return _answer(lambda x, *parameters: self._deploy(*parameters)(x), self._forward, x, *parameters)

    def _forward(self, x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
        if self.rule.activation:
            x = ops.fake_quantize(x, self.rule.activation)
        w = ops.fake_quantize(weight, self.rule.weight)
        return x @ w.T if bias is None else mx.addmm(bias, x, w.T)

    def _deploy(self, weight: mx.array, bias: mx.array | None = None) -> DeployedLinear | PackedLinear:
        return deploy_linear(ops.quantize(weight, self.rule.weight), self.rule, bias)

    def to_quantized(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses: `nn.quantize` would move the weight off the grid it was trained on."""
        _refuse(self.rule)


class FakeEmbedding(nn.Embedding):
    """An embedding whose weight is fake-quantized, also where it is the output head. Otherwise as `FakeLinear`."""

    def __init__(self, layer: nn.Embedding, rule: Rule) -> None:
        nn.Module.__init__(self)  # not Embedding's: it would draw a random weight
        _adopt(self, layer, rule)

    def __call__(self, x: mx.array) -> mx.array:
        def forward(weight: mx.array) -> mx.array:
            return ops.fake_quantize(weight, self.rule.weight)[x]

        if self.training:
            return forward(self["weight"])
        return _answer(lambda weight: self._deploy(weight)(x), forward, self["weight"])

    def as_linear(self, x: mx.array) -> mx.array:
        """The output head of a tied model: x [..., width] -> [..., entries]."""
        if self.training:
            return self._head(x, self["weight"])
        return _answer(lambda x, weight: self._deploy(weight).as_linear(x), self._head, x, self["weight"])

    def _head(self, x: mx.array, weight: mx.array) -> mx.array:
        return x @ ops.fake_quantize(weight, self.rule.weight).T

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
    fake.freeze(keys=list(layer._no_grad))
    fake.train(layer.training)


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
