"""Cached codes of weights, recomputed when the weights change, those of many in one launch. No arithmetic."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from qkit.engines.kept import Store
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit_torchao.cache import identity
from qkit_torchao.cache.ahead import Ahead
from qkit_torchao.cache.identity import KeptOfTensor
from qkit_torchao.kernels import choose, later

T = TypeVar("T")
Codes = tuple[QTensor[Tensor], Tensor]  #: codes, and the float32 steps of their groups


class Coded(KeptOfTensor[Codes]):
    """The codes of one weight, and their steps.

    Attributes:
        used: whether the codes were used since they were computed. Unused ones are not recomputed with others.
        ahead: the prepared launch that will compute them, if any.
        operand: views of the codes and their steps as a product takes them, and the codes that they are of.
    """

    __slots__ = ("__weakref__", "ahead", "operand", "used")

    def __init__(self, owner: Tensor, store: Any) -> None:
        super().__init__(owner, store)
        self.used = False
        self.operand: tuple[Any, Any] = (None, None)
        self.ahead: Ahead[Coded] | None = None

    def places(self) -> tuple[Any, ...]:
        """Where a launch finds the weight, its codes, their scales and their steps."""
        if self.seen is None or self.value is None:
            return ()
        q, steps = self.value
        return self.seen.data_ptr(), q.codes.data_ptr(), q.scales.data_ptr(), steps.data_ptr()


def operand_of(weight: Tensor, grid: Grid, view: Callable[[QTensor[Tensor], Tensor], T]) -> T:
    """`view(*of(weight, grid))`, which refers to the memory of the codes and of their steps, and is made once for it."""
    kept = _codes.of(weight)
    if kept is not None and kept.value is not None and kept.value[0].grid is grid:
        made, like = kept.operand
        if like is kept.value and kept.current(identity.state(weight)) is like:
            kept.used = True
            return made  # type: ignore[no-any-return]
    value = of(weight, grid)
    kept = _codes.of(weight)
    assert kept is not None
    made, like = kept.operand
    if like is not value:
        made = view(*value)
        kept.operand = made, value
    return made  # type: ignore[no-any-return]


def of(weight: Tensor, grid: Grid) -> Codes:
    """The cached codes of finite `weight` on `grid`, and their steps in float32.

    Recomputed in place when the weight changes, together with every other stale weight that was used since its last update.

    The memory of a captured graph is its own: layers call this once before one is captured. From then on the memory stays.
    """
    kept = _codes.of(weight)
    if kept is None or (kept.value is not None and not _fits(kept.value[0], weight, grid)):
        kept = Coded(weight, _codes)
    stamp = identity.state(weight)
    value = kept.current(stamp)
    if value is None:
        value = _recompute(kept, weight, grid, stamp)
    kept.used = True
    return value


def fresh(weight: Tensor, grid: Grid) -> Codes:
    """As `of`, but computed anew and not cached: for weights that are gathered for a moment."""
    steps = torch.empty(grid.scale_shape(tuple(weight.shape)), dtype=torch.float32, device=weight.device)
    return choose.quantize(weight.detach(), grid, steps=steps), steps


def drop(weight: Tensor) -> None:
    """Drops the cached codes of `weight`; the next use recomputes them."""
    if kept := _codes.of(weight):
        kept.drop()


_codes: Store[Coded] = Store()


def _recompute(kept: Coded, weight: Tensor, grid: Grid, stamp: tuple[Any, ...]) -> Codes:
    """The codes of `weight`, whose cache is `kept`, computed with those of others that are stale and can share its launch."""
    with torch.inference_mode(False), torch.no_grad():
        if kept.ahead is not None and not stamp[-1]:
            for one, now in kept.ahead.launch():
                one.stamp, one.used = now, False
        if kept.value is None:
            _put(kept, weight, fresh(weight, grid), stamp)
        elif kept.stamp != stamp:
            stale = [(kept, weight, stamp), *_stale_beside(kept, weight)]
            choose.quantize_into([one.detach() for _, one, _ in stale], [_value(one) for one, _, _ in stale])
            for one, its, now in stale:
                _put(one, its, _value(one), now)
    return _value(kept)


def _stale_beside(kept: Coded, weight: Tensor) -> list[tuple[Coded, Tensor, tuple[Any, ...]]]:
    like, found = _value(kept)[0], []
    for other in list(_codes.values()):
        its = other()
        if other is kept or its is None or not other.used or other.value is None:
            continue
        q = other.value[0]
        alike = q.grid == like.grid and its.shape[-1] == weight.shape[-1] and q.codes.device == like.codes.device
        if alike and its.dtype == weight.dtype and _fits(q, its, q.grid):
            now = identity.state(its)
            if other.current(now) is None:
                found.append((other, its, now))
    return found


def _prepare(_: Any) -> None:
    """Prepares the launches for all codes that an optimizer's step has made stale, see `ahead`."""
    groups: dict[Any, list[tuple[Coded, Any]]] = {}
    for kept in list(_codes.values()):
        weight = kept()
        if weight is None or not choose.on_gpu(weight):
            continue
        if not kept.used or kept.captured or not kept.stamp or not kept.value:
            continue
        q, now, seen = kept.value[0], identity.state(weight), kept.seen
        lies = seen is not None and seen.data_ptr() == weight.data_ptr() and _fits(q, weight, q.grid)
        if lies and kept.stamp != now and not now[-1]:
            groups.setdefault((q.grid, weight.dtype, weight.device, weight.shape[-1]), []).append((kept, now))
    for some in groups.values():
        launch = later.codes([_seen(one) for one, _ in some], [_value(one) for one, _ in some])
        if launch:
            Ahead(some, partial(_run, launch))


def _run(launch: Callable[[Tensor, Tensor], None], first: Coded) -> None:
    launch(_seen(first), _value(first)[0].codes)


def _seen(kept: Coded) -> Tensor:
    assert kept.seen is not None
    return kept.seen


def _put(kept: Coded, weight: Tensor, value: Codes, stamp: tuple[Any, ...]) -> None:
    kept.seen, kept.captured, kept.used = weight.detach(), kept.captured or bool(stamp[-1]), False
    kept.ahead = None
    kept.put(value, stamp)


def _value(kept: Coded) -> Codes:
    assert kept.value is not None
    return kept.value


def _fits(q: QTensor[Tensor], weight: Tensor, grid: Grid) -> bool:
    return q.grid == grid and (q.codes.shape, q.codes.device, q.dtype) == (
        weight.shape,
        weight.device,
        dtype_of(weight),
    )


identity.after_step.append(_prepare)
