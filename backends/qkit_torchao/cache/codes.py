"""Cached codes of weights, recomputed when the weights change, those of many in one launch. No arithmetic."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from qkit.engines.kept import Store
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit_torchao.cache import identity
from qkit_torchao.cache.identity import KeptOfTensor
from qkit_torchao.kernels import choose

T = TypeVar("T")
Codes = tuple[QTensor[Tensor], Tensor]  #: codes, and the float32 steps of their groups


class Coded(KeptOfTensor[Codes]):
    """The codes of one weight, and their steps.

    Attributes:
        used: whether the codes were used since they were computed. Unused ones are not recomputed with others.
        operand: views of the codes and their steps as a product takes them, and the codes that they are of.
    """

    __slots__ = ("operand", "used")

    def __init__(self, owner: Tensor, store: Any) -> None:
        super().__init__(owner, store)
        self.used = False
        self.operand: tuple[Any, Any] = (None, None)


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
        if kept.value is None:
            _put(kept, weight, fresh(weight, grid), stamp)
        else:
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


def _put(kept: Coded, weight: Tensor, value: Codes, stamp: tuple[Any, ...]) -> None:
    kept.seen, kept.captured, kept.used = weight.detach(), kept.captured or bool(stamp[-1]), False
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
