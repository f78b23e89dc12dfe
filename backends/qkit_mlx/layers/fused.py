"""Layers that train and share a tensor scale, since servers run them as one layer; see `qkit.fused`.

The layers of a group hold one `Group`, which holds their modules. MLX finds the modules of a model in dictionaries and lists, and
must not find these a second time.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from qkit.fused import shares
from qkit_mlx.kernels import choose


class Group:
    """Layers that share a tensor scale, and the last peak that each of them has found.

    Attributes:
        layers: the layers.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = tuple(layers)
        self._found: tuple[mx.array, ...] = ()
        self._peak: mx.array | None = None

    def peak(self, weights: Sequence[mx.array]) -> mx.array:
        """The largest magnitude of the layers, float32 []: the same array as long as those of their weights are the same."""
        if len(self._found) != len(weights) or any(a is not b for a, b in zip(self._found, weights, strict=True)):
            self._found = tuple(weights)
            self._peak = mx.stack(list(weights)).max()
        assert self._peak is not None
        return self._peak

    def __getstate__(self) -> tuple[Any, ...]:
        return self.layers

    def __setstate__(self, layers: tuple[Any, ...]) -> None:
        self.layers, self._found, self._peak = layers, (), None


def fuse(layers: Sequence[Any]) -> None:
    """See `Fuses.fuse`."""
    group = Group(layers)
    for layer in layers:
        layer.fused = group


def peak(layer: Any, weight: mx.array) -> mx.array | None:
    """The largest magnitude of the layer's `weight` and of those that share its tensor scale; None if none do."""
    group: Group | None = layer.__dict__.get("fused")
    if group is None or not shares(layer.rule.weight):
        return None
    sharing = [other for other in group.layers if shares(other.rule.weight)]
    if len(sharing) < 2:
        return None
    return group.peak([_peak_of(other, weight if other is layer else other.own_weight()) for other in sharing])


def _peak_of(layer: Any, weight: mx.array) -> mx.array:
    found: mx.array = layer.cached_peak.of(weight, choose.peak, traced=True)
    return found
