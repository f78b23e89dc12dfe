"""The value that was computed last from an array, and the array's contents at that time."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import mlx.core as mx

from qkit.engines.kept import Kept
from qkit_mlx.cache.identity import is_copy, is_snapshot, snapshot

T = TypeVar("T")


class _Stamp(NamedTuple):
    """The state that a value was computed at."""

    contents: mx.array  #: a snapshot of the array
    key: tuple[Any, ...]


class LastValue(Generic[T]):
    """Caches the value that was computed last. Returns it again for the same contents of an array, and for no others.

    Works in traced functions: a value from a trace is found only in the same trace. Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._kept: Kept[T] | None = None
        self._search = True  #: whether to search graphs for copies; False after a graph that was too long

    def of(self, x: mx.array, compute: Callable[[mx.array], T], *key: object, traced: bool = False) -> T:
        """`compute(x)`: the cached value, if the contents of `x` and the objects of `key` are those of the last call.

        With `traced`, the array may be another with the same contents: the tracer that `mx.value_and_grad` makes of a weight.
        """
        kept = self._kept
        now = _Stamp(x, key)
        value = None if kept is None else kept.current(now, self._same_traced if traced and self._search else _same)
        if kept is None or value is None:
            return self._keep(x, key, compute(x))
        return value if kept() is x else self._keep(x, key, value)

    def _keep(self, x: mx.array, key: tuple[Any, ...], value: T) -> T:
        self._kept = Kept(x)
        return self._kept.put(value, _Stamp(snapshot(x), key))

    def _same_traced(self, now: _Stamp, then: _Stamp) -> bool:
        if not _identical(now.key, then.key):
            return False
        found = is_copy(now.contents, then.contents)
        self._search = found is not None
        return bool(found)

    def __reduce__(self) -> tuple[type["LastValue[T]"], tuple[()]]:
        return LastValue, ()


def _same(now: _Stamp, then: _Stamp) -> bool:
    return _identical(now.key, then.key) and is_snapshot(now.contents, then.contents)


def _identical(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
