"""Cached values of quantized inputs, for all layers that get the same tensor. No arithmetic."""

from typing import Any

from torch import Tensor

from qkit.engines.kept import Kept, Store


class Input(Kept[Tensor]):
    """The quantized values of one input.

    Attributes:
        takers: ids of the layers that took the values. A layer that asks again is in another forward pass.
    """

    __slots__ = ("takers",)

    takers: set[int]


class CodedInput(Kept[Any]):
    """The codes, steps and values of one input; see `Input`."""

    __slots__ = ("takers",)

    takers: set[int]


inputs: Store[Input] = Store()
coded: Store[CodedInput] = Store()
