"""A framework of forty lines: tensors, linear layers and sequences of modules, all over NumPy."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


class Tensor:
    """An array of this framework."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype


class Module:
    """Something that maps a tensor to a tensor."""

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Linear(Module):
    """x [batch, inputs] -> [batch, outputs]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return Tensor(x.array @ self.weight.array.T + self.bias.array)


class Sequential(Module):
    """Named modules, one after another."""

    def __init__(self, **modules: Module) -> None:
        self.modules = modules

    def __call__(self, x: Tensor) -> Tensor:
        for module in self.modules.values():
            x = module(x)
        return x
