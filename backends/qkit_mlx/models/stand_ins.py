"""Modules in the place of blocks and layers, which show what goes through them."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class StandIn:
    """In the place of a block: calls a function with its number, and has the attributes of the block."""

    def __init__(self, block: nn.Module, number: int, called: Callable[..., Any]) -> None:
        self._block, self._number, self._called = block, number, called

    def __call__(self, *args: Any, **given: Any) -> Any:
        """Whatever the function returns."""
        return self._called(self._number, *args, **given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class Watched(nn.Module):
    """In the place of a layer: runs it, and shows its inputs and outputs."""

    def __init__(self, layer: nn.Module, show: Callable[[mx.array, mx.array], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = layer
        object.__setattr__(self, "_show", show)  # a module would take it for a parameter

    def __call__(self, x: mx.array) -> mx.array:
        """The outputs of the layer."""
        out: mx.array = self.layer(x)
        self._show(x, out)
        return out


class Tapped(nn.Module):
    """In the place of a layer: runs it, and adds zeros to its outputs, whose gradient is that of these outputs."""

    def __init__(self, layer: nn.Module, path: str, taps: Mapping[str, mx.array]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = layer
        object.__setattr__(self, "_tap", (path, taps))  # a module would take it for a parameter

    def __call__(self, x: mx.array) -> mx.array:
        """The outputs of the layer, and the zeros."""
        path, taps = self._tap
        out: mx.array = self.layer(x) + taps[path]
        return out
