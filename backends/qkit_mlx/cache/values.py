"""What was made of an array, kept until the array is another or is gone."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import ref

import mlx.core as mx

from qkit_mlx.cache.identity import is_copy, is_snapshot, snapshot

T = TypeVar("T")


class _Kept(NamedTuple):
    owner: ref[mx.array]  #: the array object; with it goes all of this
    held: mx.array
    key: tuple[Any, ...]
    values: Any


class Once(Generic[T]):
    """Remembers the last values that were made, and gives them again for the same contents and only for them.

    Right in traced functions too: what is traced is found again only in the same trace. Copies of it, and pickles, are empty.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self._patient = True

    def of(self, x: mx.array, make: Callable[[mx.array], T], *key: object, traced: bool = False) -> T:
        """`make(x)`, or what it gave for the contents of `x` before, with objects that were identical to those of `key`.

        With `traced`, the array may be another with these contents: the tracer that `mx.value_and_grad` makes of a weight.
        """
        kept = self._kept
        if kept is None or not _identical(kept.key, key) or not self._same(x, kept.held, traced=traced):
            return self._keep(x, key, make(x))
        values: T = kept.values
        return self._keep(x, key, values) if kept.owner() is not x else values

    def _keep(self, x: mx.array, key: tuple[Any, ...], values: T) -> T:
        def forget(owner: ref[mx.array]) -> None:
            if self._kept is not None and self._kept.owner is owner:
                self._kept = None

        self._kept = _Kept(ref(x, forget), snapshot(x), key, values)
        return values

    def _same(self, x: mx.array, held: mx.array, *, traced: bool) -> bool:
        if not (traced and self._patient):
            return is_snapshot(x, held)
        found = is_copy(x, held)
        self._patient = found is not None
        return bool(found)

    def __reduce__(self) -> tuple[type["Once[T]"], tuple[()]]:
        return Once, ()


def _identical(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
