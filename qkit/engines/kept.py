"""A value that was computed from an array, kept until the array changes or is gone. Knows no framework.

Nothing tells Python that an array has changed. Each engine therefore stamps a value with the state of its array: a version, an
address, a snapshot. A value is current as long as the stamp of now is the stamp that it was computed at.
"""

from collections.abc import Callable, Iterator
from operator import eq
from typing import Any, Generic, TypeVar
from weakref import ref

T = TypeVar("T")
K = TypeVar("K", bound="Kept[Any]")


class Kept(ref[Any], Generic[T]):
    """A weak reference to an array, the owner, with a value that was computed from it. Calling it gives the owner, or None.

    Compares by identity. When the owner is gone, the value is gone too.

    Attributes:
        value: the value, or None before the first `put`. A stale value stays, so that its memory can be written again.
        stamp: the state of the owner at which `value` was computed; None where there is no such state.
        frozen: whether a value is current whatever becomes of its owner.

    >>> class Weight: ...
    >>> weight = Weight()
    >>> kept: Kept[str] = Kept(weight)
    >>> kept.put("codes at version 0", stamp=0)
    'codes at version 0'
    >>> kept.current(stamp=0)
    'codes at version 0'
    >>> kept.current(stamp=1) is None  # the weight has changed: compute the value, and put it
    True
    >>> del weight
    >>> kept.value is None
    True
    """

    __slots__ = ("_number", "_store", "frozen", "stamp", "value")

    value: T | None
    stamp: Any
    frozen: bool

    def __new__(cls, owner: object, *more: Any) -> "Kept[T]":
        """A reference to `owner`; `more` is for the constructors of subclasses."""
        return ref.__new__(cls, owner, _forget)

    def __init__(self, owner: object) -> None:
        self.value, self.stamp, self.frozen = None, None, False
        self._number = id(owner)
        self._store: Store[Any] | None = None

    def current(self, stamp: Any, same: Callable[[Any, Any], Any] = eq) -> T | None:
        """The value, if it is frozen or `same(stamp, the stamp it was computed at)`; else None."""
        if self.stamp is None or not (self.frozen or same(stamp, self.stamp)):
            return None
        return self.value

    def put(self, value: T, stamp: Any) -> T:
        """Keeps `value`, computed at `stamp`, which must not be None; returns it."""
        self.value, self.stamp = value, stamp
        return value

    def drop(self) -> None:
        """Makes the value stale, unless it is frozen: the next use has to compute it again."""
        if not self.frozen:
            self.stamp = None

    def freeze(self) -> None:
        """Has the value of the next use stay current until `thaw`, or until the next `freeze`."""
        self.stamp, self.frozen = None, True

    def thaw(self) -> None:
        """Undoes `freeze`; the next use computes the value again."""
        self.stamp, self.frozen = None, False

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Store(Generic[K]):
    """The kept values of many owners, at most one for each. Owners that are gone leave nothing behind.

    >>> class Weight: ...
    >>> store, weight = Store[Kept[int]](), Weight()
    >>> store.add(Kept(weight)).put(7, stamp=0)
    7
    >>> store.of(weight).value
    7
    >>> del weight
    >>> list(store)
    []
    """

    def __init__(self) -> None:
        self._kept: dict[int, K] = {}

    def of(self, owner: object) -> K | None:
        """What is kept for `owner`, or None."""
        kept = self._kept.get(id(owner))
        return kept if kept is not None and kept() is owner else None

    def add(self, kept: K) -> K:
        """Stores `kept` in place of the value that its owner had here, if any; returns it."""
        kept._store = self
        self._kept[kept._number] = kept
        return kept

    def remove(self, owner: object) -> K | None:
        """Removes what is kept for `owner`, and returns it; None if there is nothing."""
        return self._kept.pop(id(owner), None)

    def __iter__(self) -> Iterator[K]:
        return iter(list(self._kept.values()))


def _forget(kept: Kept[Any]) -> None:
    kept.value = kept.stamp = None
    store = kept._store
    if store is not None and store._kept.get(kept._number) is kept:
        del store._kept[kept._number]
