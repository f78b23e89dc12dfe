"""Prepared experts whose values depend on more than their weights, so that each forward computes them once."""

from typing import Any

import torch
from torch import Tensor

from qkit_torchao.layers.prepared_experts import FakeExperts
from qkit_torchao.layers.stacks import Stack


class ComputedExperts(FakeExperts):
    """Prepared experts with adapters or learned scales.

    transformers' eager implementation reads a parameter for every expert; `found` has the values for one forward.

    Attributes:
        found: by stack, the values that the forward in progress has computed; None outside of a forward.
    """

    found: dict[str, Tensor] | None = None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As `FakeExperts.forward`."""
        outer, self.__dict__["found"] = self.found, {}
        try:
            return super().forward(*inputs, **named)
        finally:
            self.__dict__["found"] = outer

    def values_of(self, stack: Stack) -> Tensor:
        """See `FakeExperts.values_of`."""
        if torch.compiler.is_compiling():
            merged = self.merged(stack)
            return torch.where(self.gate, self.on_grid(merged, stack), merged)
        found = {} if self.found is None else self.found
        if stack.name not in found:
            merged = self.merged(stack)
            found[stack.name] = merged if self.mode == "off" else self.on_grid(merged, stack)
        return found[stack.name]

    def merged(self, stack: Stack) -> Tensor:
        """The weight whose values are on the grid, laid out as the parameter of `stack`."""
        return self.master(stack)

    def on_grid(self, weight: Tensor, stack: Stack) -> Tensor:
        """The values of `weight`, laid out as the parameter of `stack`, with the gradient of the straight-through estimator."""
        raise NotImplementedError
