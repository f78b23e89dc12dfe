"""Launches over many weights, prepared after the step that makes their values stale, while the device still works. No arithmetic.

A step begins with a launch that computes the values of all weights. To find these weights, and where each lies, takes the host
longer than the launch takes the device, which has nothing else to do then. After an optimizer's step it still has.
"""

from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar
from weakref import ref


class Member(Protocol):
    """A cached value that shares a launch with others."""

    ahead: "Ahead[Any] | None"

    def places(self) -> tuple[Any, ...]:
        """Whatever the launch has read of addresses."""


M = TypeVar("M", bound=Member)


class Ahead(Generic[M]):
    """A prepared launch. It keeps no tensor alive.

    Attributes:
        run: the launch, by its first member.
        members: weak references to the members, the stamps that their values will have, and their places.
    """

    def __init__(self, members: Iterable[tuple[M, Any]], run: Callable[[M], None]) -> None:
        self.run = run
        self.members = [(ref(one), stamp, one.places()) for one, stamp in members]
        for one, _ in members:
            one.ahead = self

    def launch(self) -> list[tuple[M, Any]]:
        """Launches, and returns the members with the stamps of their values; does nothing where a member lies elsewhere now."""
        found = []
        for reference, stamp, places in self.members:
            one = reference()
            if one is None or one.ahead is not self or one.places() != places:
                return []
            found.append((one, stamp))
        for one, _ in found:
            one.ahead = None
        self.run(found[0][0])
        return found
