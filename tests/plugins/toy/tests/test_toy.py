"""The tests that a plugin's author writes: the whole suite, on a model of the framework."""

from toyframe import Linear, Sequential, Tensor

from qkit.testing import Conformance, random


class TestToy(Conformance):
    backend = "toy"

    def model(self) -> Sequential:
        inner = Sequential(second=_linear(256, 128, 2))
        return Sequential(first=_linear(128, 256, 1), inner=inner, last=_linear(64, 256, 3))

    def shared_model(self) -> Sequential:
        twice = _linear(128, 128, 4)
        return Sequential(one=twice, other=twice)

    def forward(self, model: Sequential, x: Tensor) -> Tensor:
        return model(x)


def _linear(outputs: int, inputs: int, seed: int) -> Linear:
    return Linear(Tensor(random((outputs, inputs), seed)), Tensor(random((outputs,), seed + 100)))
