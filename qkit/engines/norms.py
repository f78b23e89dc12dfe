"""The protocol of engines whose norms train beside adapters; the other protocols are in `protocol`."""

from collections.abc import Collection
from typing import Any, Protocol

from qkit.engines.protocol import Adapts


class TrainsNorms(Adapts, Protocol):
    """Norms that train while everything else but adapters is frozen."""

    def norms(self, model: Any) -> dict[str, bool]:
        """Whether each weight and bias of a norm trains, by its name in `Modules.tensors`; only those of one dimension."""
        ...

    def train_norms(self, model: Any, names: Collection[str]) -> None:
        """Has the norms of these `names` train, too."""
        ...
