"""The tests that a plugin's author writes: the suite for arrays alone, and the whole one on a model of the framework."""

from qkit_toy.backend import ToyArrays
from toyframe import Linear, Sequential, Tensor

from qkit.testing import ArrayConformance, Conformance, random


class TestArraysAlone(ArrayConformance):
    backend = "toy"

    @property
    def engine(self) -> ToyArrays:
        return ToyArrays()


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
