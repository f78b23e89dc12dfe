"""Layers that train and share a tensor scale, since servers run them as one layer; see `qkit.fused`. No arithmetic."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qkit.fused import shares
from qkit_torchao.cache import values
from qkit_torchao.layers import shard_first


def fuse(layers: Sequence[Any]) -> None:
    """See `Fuses.fuse`."""
    for layer in layers:
        layer.fused = tuple(other for other in layers if other is not layer)
        if hasattr(layer, "caches"):  # a prepared layer
            values.drop(layer.weight)


def partners(layer: Any) -> tuple[Tensor, ...]:
    """The other weights that share the tensor scale of a layer; none where its grid has no tensor scale."""
    if not (layer.fused and shares(layer.rule.weight)):
        return ()
    return tuple(other.own_weight() for other in layer.fused if shares(other.rule.weight))


def drop(layer: Any) -> None:
    """Drops the cached values of a layer, and those that depend on its weight."""
    shard_first.drop(layer.weight)
    if layer.fused and shares(layer.rule.weight):
        for other in layer.fused:
            shard_first.drop(other.weight)
