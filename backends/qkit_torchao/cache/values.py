"""Cached values of weights, recomputed when the weights change. No arithmetic."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from qkit.engines.kept import Store
from qkit.grid import Grid
from qkit_torchao.cache import codes, identity
from qkit_torchao.cache.ahead import Ahead
from qkit_torchao.cache.kept_values import Partners, Values
from qkit_torchao.kernels import choose, graphs, later
from qkit_torchao.torch_private import mark_static_address, version, without_subclasses


def of(
    weight: Tensor,
    grid: Grid,
    gate: Tensor,
    dtype: torch.dtype,
    partners: Partners = (),
    *,
    into: Tensor | None = None,
) -> Tensor:
    """The cached values of `weight` on `grid`, in `dtype`; where `gate` is off, `weight` itself in `dtype`. No gradient passes.

    Recomputed in place when the weight changes, together with every other stale weight that was used since its last update.

    A change shows in torch's version counter, in another storage, type, device or gate. Besides, every step of an optimizer
    counts as a change, unless the weight is frozen, and so does `drop`, which `train()` and `eval()` call. Call `drop` after a
    write through `.data` outside of an optimizer: nothing else shows it. A captured CUDA graph recomputes the values at every
    replay. After that they are recomputed at every use outside of the graph, since nobody sees replays.

    Args:
        partners: the other weights that share the tensor scale; the values are recomputed when one of them changes, too.
        into: the buffer to compute them in, see `buffer`. Another weight whose values were there loses them.
    """
    kept = _values_of(weight, grid, gate, dtype, partners)
    if kept.dropped_at is not None:
        if kept.dropped_at == version(weight):  # it may have changed all the same
            identity.refuse_older([weight])
        kept.dropped_at = None
    if into is not None and into is not kept.value:
        _move(kept, into)
    stamp = kept.now(weight)
    values = kept.current(stamp)
    if values is None or (kept.frozen and not _fits(values, weight)):
        _recompute(kept, stamp)
        values = kept.value
    kept.used = True
    assert values is not None
    return values


def launch_prepared(weight: Tensor) -> None:
    """Runs the prepared launch that computes the values of `weight`, if there is one; see `ahead`."""
    kept = _values.of(weight)
    if kept is not None and kept.ahead is not None and kept.grid is not None and kept.dtype is not None:
        of(weight, kept.grid, kept.gate, kept.dtype)  # type: ignore[arg-type]


def current(weight: Tensor, grid: Grid, gate: Tensor, buffer: Tensor | None, partners: Partners = ()) -> Tensor | None:
    """`buffer`, if `of` would return it without computing anything; else None. Faster than `of`."""
    kept = _values.get(id(weight))
    if kept is None or kept.value is not buffer or kept.grid is not grid or kept.gate is not gate:
        return None
    if (partners or kept.partners) and not kept.with_partners(partners):
        return None
    if kept() is not weight or kept.captured or kept.stamp != kept.now(weight):
        return None
    kept.used = True
    return buffer


def fill(buffer: Tensor, weight: Tensor, grid: Grid, gate: Tensor, partners: Partners = ()) -> None:
    """Fills `buffer` with the values of `weight`, cached there; or with a copy, where a compiler replaced the buffer's memory."""
    kept = _values.get(id(weight))
    ours = buffer.data_ptr() in _buffers
    if ours and kept is not None and kept.value is not None and kept.value.data_ptr() == buffer.data_ptr():
        known = current(weight, kept.grid or grid, gate, kept.value, partners) if kept.grid == grid else None
        if known is not None and known.dtype == buffer.dtype:
            return
    values = of(weight, grid, gate, buffer.dtype, partners, into=buffer if ours else None)
    if values.data_ptr() != buffer.data_ptr():
        buffer.copy_(values)


def buffer(weight: Tensor, grid: Grid, gate: Tensor) -> Tensor:
    """Memory for the values of `weight` in its own type, the same for all layers that share the weight; not computed yet.

    Layers refer to it, so that compiled code takes it as an input at a fixed address, and CUDA graphs need not copy it.
    """
    kept = _values_of(weight, grid, gate, weight.dtype, None)
    kept.stamp = kept.seen = None
    if kept.value is None or not _fits(kept.value, weight):
        with torch.inference_mode(False):
            kept.value = torch.empty_like(weight.detach(), memory_format=torch.contiguous_format)
        mark_static_address(kept.value)
    _users[kept.value.data_ptr()] = kept
    _buffers[kept.value.data_ptr()] = kept.value
    return kept.value


def may_use(weight: Tensor, buffer: Tensor) -> bool:
    """Whether the values of `weight` may be in `buffer`: not where a layer computes with a weight that is not its own."""
    user = _users.get(buffer.data_ptr())
    return user is None or user() is weight


def fresh(weight: Tensor, grid: Grid, gate: Tensor, dtype: torch.dtype, partners: Partners = ()) -> Tensor:
    """As `of`, but computed anew and not cached: for weights that are gathered for a moment."""
    values = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    with torch.no_grad():
        others = tuple(other.detach() for other in partners)
        choose.compute_values([weight.detach()], [values], [gate], grid, [others])
    return values


def freeze(weight: Tensor) -> None:
    """Fixes the values that `weight` has at its next use, until the next `freeze` or `thaw`, whatever becomes of the weight."""
    thaw(weight)
    (_values.of(weight) or Values(weight, _values)).freeze()


def thaw(weight: Tensor) -> None:
    """Undoes `freeze`."""
    if kept := _values.of(weight):
        kept.thaw()
    drop(weight)


def drop(weight: Tensor) -> None:
    """Drops the cached values and codes of `weight`, unless its values are frozen; the next use recomputes them."""
    kept = _values.of(weight)
    if kept is not None:
        if kept.frozen:
            return
        kept.clear()
        kept.dropped_at = version(weight)
    codes.drop(weight)


def cached(weights: Iterable[Tensor]) -> dict[int, Values]:
    """The cached values of `weights` by the ids of weights, but for frozen ones: optimizers may write them while they step."""
    known = {id(weight): _values.of(weight) for weight in weights}
    return {key: kept for key, kept in known.items() if kept is not None and kept.value is not None and not kept.frozen}


_values: Store[Values] = Store()
_buffers: "WeakValueDictionary[int, Tensor]" = WeakValueDictionary()  #: by their addresses
_users: "WeakValueDictionary[int, Values]" = WeakValueDictionary()  #: of buffers, by the buffers' addresses


def _values_of(weight: Tensor, grid: Grid, gate: Tensor, dtype: torch.dtype, partners: Partners | None) -> Values:
    kept = _values.of(weight) or Values(weight, _values)
    if kept.dtype != dtype or not (kept.grid is grid or kept.grid == grid):
        kept.clear()
        kept.grid, kept.dtype = grid, dtype
    if partners is not None and not kept.with_partners(partners):
        kept.partners = tuple(ref(other) for other in partners)
        if not kept.frozen:
            kept.stamp = None
    kept.gate = gate
    return kept


def _move(kept: Values, into: Tensor) -> None:
    before = _users.get(into.data_ptr())
    if before is not kept and before is not None:
        before.value = before.stamp = None
        if (weight := before()) is not None:
            identity.refuse_older([weight])
    if before is not kept or kept.value is None or kept.value.data_ptr() != into.data_ptr():
        _users[into.data_ptr()] = kept
        kept.value, kept.stamp = into, None


def _recompute(kept: Values, stamp: tuple[Any, ...]) -> None:
    """Computes the values of `kept`, and of the others that are stale and can share its launch."""
    if kept.ahead is not None and not stamp[-1]:
        with torch.inference_mode(False), torch.no_grad():
            computed = kept.ahead.launch()
        for one, its in computed:
            one.stamp, one.used = its, False
        if kept.stamp == stamp:
            torch.autograd.graph.increment_version([one.value for one, _ in computed if one.value is not None])
            return
    stale = {id(kept): (kept, stamp)}
    for other in list(_values.values()):
        weight = other()
        if other is not kept and other.used and weight is not None and _alike(other, kept):
            now = other.now(weight)
            if other.stamp != now and not (other.frozen and other.stamp and _fits(other.value, weight)):
                stale[id(other)] = (other, now)
    with torch.inference_mode(False), torch.no_grad():  # cached values may be trained with later
        _compute([one for one, _ in stale.values()])
    for one, now in stale.values():
        weight, before = one(), one.stamp or ()
        if weight is not None and before[2:3] == now[2:3] and before[:4] != now[:4]:  # one version, other memory
            identity.refuse_older([weight])
            now = one.now(weight)
        one.stamp, one.used, one.captured, one.ahead = now, False, one.captured or bool(now[-1]), None


def _prepare(_: Any) -> None:
    """Prepares the launches for all values that an optimizer's step has made stale, see `ahead`."""
    groups: dict[Any, list[tuple[Values, Any]]] = {}
    with without_subclasses():
        for kept in list(_values.values()):
            weight = kept()
            if weight is not None and choose.on_gpu(weight) and (stamp := _stale(kept, weight)):
                rows = weight.shape[-1] if kept.grid.group == "row" else 0  # type: ignore[union-attr]
                alike = kept.grid, kept.dtype, weight.dtype, weight.device, rows
                groups.setdefault(alike, []).append((kept, stamp))
    for (grid, *_), some in groups.items():
        parts: Any = zip(*((one.seen, one.value, one.gate) for one, _ in some), strict=True)
        weights, targets, gates = map(list, parts)
        if launch := later.values(weights, targets, gates, grid):
            Ahead(some, partial(_run, launch))


def _stale(kept: Values, weight: Tensor) -> Any:
    """The stamp of now, if values that were used are stale and can be computed where they lie; else None."""
    if not kept.used or kept.frozen or kept.captured or kept.partners or kept.seen is None or not kept.stamp:
        return None
    now, before = kept.now(weight), kept.stamp
    if now == before or now[-1] or now[:2] != before[:2] or not _same_memory(kept.seen, weight):
        return None
    return now if _fits(kept.value, weight) else None


def _run(launch: Callable[[Tensor, Tensor], None], first: Values) -> None:
    assert first.seen is not None
    assert first.value is not None
    launch(first.seen, first.value)


def _compute(stale: list[Values]) -> None:
    weights, targets, gates, partners = [], [], [], []
    for kept in stale:
        weight = kept()
        assert weight is not None
        assert kept.gate is not None
        weights.append(kept.seen if kept.seen is not None and _same_memory(kept.seen, weight) else weight.detach())
        if kept.value is None or not _fits(kept.value, weight):
            allocate = partial(torch.empty_like, weight, dtype=kept.dtype, memory_format=torch.contiguous_format)
            kept.value = allocate() if graphs.number(weight.device) else graphs.lasting(allocate)
        kept.seen = weights[-1]
        targets.append(kept.value)
        gates.append(kept.gate)
        partners.append(tuple(other.detach() for other in kept.others()))
    grid = stale[0].grid
    assert grid is not None
    choose.compute_values(weights, targets, gates, grid, partners)


def _fits(values: Tensor | None, weight: Tensor) -> bool:
    return values is not None and (values.shape, values.device) == (weight.shape, weight.device)


def _same_memory(seen: Tensor, weight: Tensor) -> bool:
    return (seen.data_ptr(), seen.dtype, seen.shape) == (weight.data_ptr(), weight.dtype, weight.shape)


def _alike(one: Values, other: Values) -> bool:
    """Whether one launch can compute both."""
    a, b, grid = one.seen, other(), one.grid
    return (
        a is not None
        and b is not None
        and grid is not None
        and grid == other.grid
        and one.dtype == other.dtype
        and (a.dtype, a.device) == (b.dtype, b.device)
        and (grid.group != "row" or a.shape[-1] == b.shape[-1])
    )


def _take_written(optimizer: Any) -> None:
    """Stamps anew the values that an optimizer has written while it stepped, which are its `written`."""
    for kept in getattr(optimizer, "written", ()):
        if (weight := kept()) is not None:
            kept.stamp = kept.now(weight)


identity.after_step += [_take_written, _prepare]
