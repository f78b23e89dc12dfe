"""The quantized values of weights, made once for every change of them, all that changed in one go. Arithmetic is elsewhere."""

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit_torchao.cache import codes, identity
from qkit_torchao.kernels import choose, graphs


def of(weight: Tensor, grid: Grid, gate: Tensor, dtype: torch.dtype, *, into: Tensor | None = None) -> Tensor:
    """`weight` on `grid`, rounded to `dtype`, or, where `gate` is off, `weight` itself in `dtype`. No gradient passes.

    What is given is kept, and given again until the weight changes; then it is overwritten, with those of all other weights
    that have changed and were asked for since they were last made.

    A change is seen by torch's version counter, by another storage, type or device, by another gate, by any optimizer's step
    (unless the weight is frozen), and by `drop`, as `train()` and `eval()` call it. A write through `.data` outside of an
    optimizer is not; call `drop` after one. A captured CUDA graph begins with making them, at every replay; and what a graph
    has made is made anew at every use outside, since nobody sees replays.

    Args:
        into: where they are to be kept, see `room`; if it has those of another weight, they are forgotten.
    """
    entry = _entry(weight, grid, gate, dtype)
    if _dropped and _dropped.pop(id(weight), None) == weight._version:  # it may have changed all the same
        identity.refuse_older([weight])
    if into is not None and into is not entry.made:
        _move(entry, into)
    stamp = _stamp(entry, weight)
    if identity.old(entry.stamp, stamp, entry.captured) and not _stands(entry, weight):
        _make(entry, stamp)
    entry.asked = True
    assert entry.made is not None
    return entry.made


def standing(weight: Tensor, grid: Grid, gate: Tensor, room: Tensor | None) -> Tensor | None:
    """`room`, if `of` would give it without making anything; else None. Costs less to ask than `of`."""
    entry = _entries.get(id(weight))
    if entry is None or entry.made is not room or entry.grid is not grid or entry.gate is not gate:
        return None
    if entry.owner() is not weight or entry.captured or entry.stamp != _stamp(entry, weight):
        return None
    entry.asked = True
    return room


def fill(room: Tensor, weight: Tensor, grid: Grid, gate: Tensor) -> None:
    """Has `room` hold what `of` gives, which is kept there; or a copy, where a compiler has put other memory in its place."""
    ours = room.data_ptr() in _rooms
    made = of(weight, grid, gate, room.dtype, into=room if ours else None)
    if made.data_ptr() != room.data_ptr():
        room.copy_(made)


def room(weight: Tensor, grid: Grid, gate: Tensor) -> Tensor:
    """Memory for the values of `weight` in its own type, the same for all layers that share it; nothing is made yet.

    Layers hold it, so that compiled code is given it, and finds it where it was: graphs need not copy it.
    """
    entry = _entry(weight, grid, gate, weight.dtype)
    entry.stamp, entry.seen = (), None
    if entry.made is None or (entry.made.shape, entry.made.device) != (weight.shape, weight.device):
        with torch.inference_mode(False):
            entry.made = torch.empty_like(weight.detach(), memory_format=torch.contiguous_format)
        torch._dynamo.mark_static_address(entry.made, guard=False)
    _owners[entry.made.data_ptr()] = entry
    _rooms[entry.made.data_ptr()] = entry.made
    return entry.made


def owns(weight: Tensor, room: Tensor) -> bool:
    """Whether `room` is free for the values of `weight`: not so where a layer computes with a weight that is not its own."""
    owner = _owners.get(room.data_ptr())
    return owner is None or owner.owner() is weight


def _move(entry: "Entry", into: Tensor) -> None:
    before = _owners.get(into.data_ptr())
    if before is not entry and before is not None:
        before.made, before.stamp = None, ()
        if (weight := before.owner()) is not None:
            identity.refuse_older([weight])
    if before is not entry or entry.made is None or entry.made.data_ptr() != into.data_ptr():
        _owners[into.data_ptr()] = entry
        entry.made, entry.stamp = into, ()


def fresh(weight: Tensor, grid: Grid, gate: Tensor, dtype: torch.dtype) -> Tensor:
    """As `of`, but made anew and not kept: for weights that are gathered for a moment."""
    made = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    with torch.no_grad():
        choose.make_values([weight.detach()], [made], [gate], grid)
    return made


def hold(weight: Tensor) -> None:
    """Has the values that `weight` has at its next use given until the next `hold` or `release`, whatever becomes of it."""
    release(weight)
    _held[id(weight)] = weakref.ref(weight, partial(_held_forget, id(weight)))


def release(weight: Tensor) -> None:
    """Undoes `hold`."""
    _held.pop(id(weight), None)
    drop(weight)


def drop(weight: Tensor) -> None:
    """Forgets the values of `weight`, unless they are held; the next use makes them anew."""
    if id(weight) in _held:
        return
    if _entries.pop(id(weight), None):
        _dropped[id(weight)] = weight._version
    codes.drop(weight)


def kept(weights: Iterable[Tensor]) -> "dict[int, Entry]":
    """What is kept of `weights`, by their ids: for optimizers that write values while they step."""
    entries = {id(weight): _entries.get(id(weight)) for weight in weights}
    return {
        key: entry
        for key, entry in entries.items()
        if entry is not None and entry.made is not None and key not in _held
    }


class Entry:
    """The values of one weight, the state of the weight that they were made in, and who asks for them.

    Attributes:
        stamp: the state; empty where there are no values yet.
        seen: shares the weight's storage, so that its address is not given to another.
        asked: whether the values were used since they were made; what nobody uses is not made with the others.
        captured: whether a CUDA graph has made them, at replays that nobody sees.
    """

    __slots__ = ("__weakref__", "asked", "captured", "dtype", "gate", "grid", "made", "owner", "seen", "stamp")

    def __init__(self, weight: Tensor, grid: Grid, gate: Tensor, dtype: torch.dtype) -> None:
        self.owner = weakref.ref(weight, partial(_forget, id(weight)))
        self.grid, self.gate, self.dtype = grid, gate, dtype
        self.made: Tensor | None = None
        self.seen: Tensor | None = None
        self.stamp: tuple[Any, ...] = ()
        self.asked, self.captured = False, False


_entries: dict[int, Entry] = {}
_rooms: "weakref.WeakValueDictionary[int, Tensor]" = weakref.WeakValueDictionary()  #: by their addresses
_owners: "weakref.WeakValueDictionary[int, Entry]" = weakref.WeakValueDictionary()  #: of rooms, by their addresses
_held: "dict[int, weakref.ref[Tensor]]" = {}
_dropped: dict[int, int] = {}  #: in which version a weight was whose values were forgotten


def _entry(weight: Tensor, grid: Grid, gate: Tensor, dtype: torch.dtype) -> Entry:
    entry = _entries.get(id(weight))
    if (
        entry is None
        or entry.owner() is not weight
        or entry.dtype != dtype
        or not (entry.grid is grid or entry.grid == grid)
    ):
        entry = _entries[id(weight)] = Entry(weight, grid, gate, dtype)
    entry.gate = gate
    return entry


def _stamp(entry: Entry, weight: Tensor) -> tuple[Any, ...]:
    """What tells one state of a weight and its gate from another: two numbers of the gate's, then `watch.state`."""
    return (entry.gate._version, entry.gate.data_ptr(), *identity.state(weight))


def _stands(entry: Entry, weight: Tensor) -> bool:
    """Whether what was made is held, so that it may be out of date."""
    made = entry.made
    if id(weight) not in _held or not entry.stamp:  # not made yet
        return False
    return made is not None and (made.shape, made.device) == (weight.shape, weight.device)


def _make(entry: Entry, stamp: tuple[Any, ...]) -> None:
    """The values of `entry`, and of the others that are out of date and of one kind with it."""
    stale = {id(entry): (entry, stamp)}
    for other in list(_entries.values()):
        weight = other.owner()
        if other is not entry and other.asked and weight is not None and _alike(other, entry):
            now = _stamp(other, weight)
            if other.stamp != now and not _stands(other, weight):
                stale[id(other)] = (other, now)
    with torch.inference_mode(False), torch.no_grad():  # what is kept may be trained with later
        _fill([one for one, _ in stale.values()])
    for one, now in stale.values():
        weight = one.owner()
        if weight is not None and one.stamp[2:3] == now[2:3] and one.stamp[:4] != now[:4]:  # one version, other memory
            identity.refuse_older([weight])
            now = _stamp(one, weight)
        one.stamp, one.asked, one.captured = now, False, one.captured or bool(now[-1])


def _fill(entries: list[Entry]) -> None:
    weights = []
    for entry in entries:
        weight = entry.owner()
        assert weight is not None
        weights.append(entry.seen if entry.seen is not None and _same(entry.seen, weight) else weight.detach())
        if entry.made is None or (entry.made.shape, entry.made.device) != (weight.shape, weight.device):
            make = partial(torch.empty_like, weight, dtype=entry.dtype, memory_format=torch.contiguous_format)
            entry.made = make() if graphs.number(weight.device) else graphs.lasting(make)
        entry.seen = weights[-1]
    made = [entry.made for entry in entries if entry.made is not None]
    choose.make_values(weights, made, [entry.gate for entry in entries], entries[0].grid)


def _same(seen: Tensor, weight: Tensor) -> bool:
    return (seen.data_ptr(), seen.dtype, seen.shape) == (weight.data_ptr(), weight.dtype, weight.shape)


def _alike(one: Entry, other: Entry) -> bool:
    """Whether the values of both can be made in one launch."""
    a, b = one.seen, other.owner()
    return (
        a is not None
        and b is not None
        and one.grid == other.grid
        and one.dtype == other.dtype
        and (a.dtype, a.device) == (b.dtype, b.device)
        and (one.grid.group != "row" or a.shape[-1] == b.shape[-1])
    )


def _forget(key: int, _: Any) -> None:
    _entries.pop(key, None)


def _held_forget(key: int, _: Any) -> None:
    _held.pop(key, None)


def _take_written(optimizer: Any) -> None:
    """An optimizer's `written` are what it has brought up to date with the weights that it has stepped."""
    for entry in getattr(optimizer, "written", ()):
        if (weight := entry.owner()) is not None:
            entry.stamp = _stamp(entry, weight)


identity.after_step.append(_take_written)
