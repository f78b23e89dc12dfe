"""The cached values of one weight, and the state that they were computed at: of the weight, its gate and its partners."""

from typing import Any
from weakref import ref

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit_torchao.cache import identity
from qkit_torchao.cache.ahead import Ahead
from qkit_torchao.cache.identity import KeptOfTensor
from qkit_torchao.torch_private import version

Partners = tuple[Tensor, ...]  #: the other weights that share the tensor scale of a weight


class Values(KeptOfTensor[Tensor]):
    """The cached values of one weight.

    Attributes:
        grid, gate, dtype: the values are on `grid` where `gate` is on, and of type `dtype`.
        partners: the other weights that share the tensor scale of the grid, so that the values depend on them too.
        used: whether the values were used since they were computed. Unused ones are not recomputed with others.
        ahead: the prepared launch that will compute them, if any.
        dropped_at: the version of the weight when its values were dropped, until the next use.
    """

    __slots__ = ("__weakref__", "ahead", "dropped_at", "dtype", "gate", "grid", "partners", "used")

    def __init__(self, owner: Tensor, store: Any) -> None:
        super().__init__(owner, store)
        self.grid: Grid | None = None
        self.gate: Tensor | None = None
        self.dtype: torch.dtype | None = None
        self.partners: tuple[ref[Tensor], ...] = ()
        self.dropped_at: int | None = None
        self.used = False
        self.ahead: Ahead[Values] | None = None

    def places(self) -> tuple[Any, ...]:
        """Where a launch finds the weight, its values and its gate."""
        if self.seen is None or self.value is None or self.gate is None:
            return ()
        return self.seen.data_ptr(), self.value.data_ptr(), self.gate.data_ptr()

    def clear(self) -> None:
        """Forgets the values and their memory; a frozen weight stays frozen."""
        self.value = self.stamp = self.seen = None
        self.used = self.captured = False
        self.ahead = None

    def now(self, weight: Tensor) -> tuple[Any, ...]:
        """The stamp of `weight`, the owner, and of the gate: two numbers of the gate's, then `identity.state`, then partners'."""
        gate: Any = self.gate
        own = (version(gate), gate.data_ptr(), *identity.state(weight))
        if not self.partners:
            return own
        others = [other() for other in self.partners]
        return (*own[:-1], *(None if other is None else identity.state(other) for other in others), own[-1])

    def with_partners(self, partners: Partners) -> bool:
        """Whether the values depend on `partners`, the same tensors in the same order."""
        return len(partners) == len(self.partners) and all(map(_refers, self.partners, partners))

    def others(self) -> Partners:
        """The partners that are not gone."""
        return tuple(other for one in self.partners if (other := one()) is not None)


def _refers(one: "ref[Tensor]", other: Tensor) -> bool:
    return one() is other
