"""The codes of weights that layers multiply, kept as `values` are, and made anew one by one."""

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit_torchao.cache import identity
from qkit_torchao.kernels import choose


def of(weight: Tensor, grid: Grid) -> tuple[QTensor[Tensor], Tensor]:
    """The codes of finite `weight` on `grid`, and their steps in float32, kept until the weight changes.

    They stay where they were first made, so that layers ask once before a graph is captured, whose memory is its own.
    """
    known = _kept.get(id(weight))
    stamp = identity.state(weight)
    if known is not None and (known.owner() is not weight or known.q.grid != grid or not _fits(known, weight)):
        known = None
    if known is None or identity.old(known.stamp, stamp, known.captured):
        with torch.inference_mode(False), torch.no_grad():
            q, steps = fresh(weight, grid)
            if known is None:
                owner = weakref.ref(weight, partial(_forget, id(weight)))
                known = _kept[id(weight)] = _Codes(owner, stamp, q, steps, weight.detach(), captured=False)
            else:
                for mine, new in zip(known.q.parts().values(), q.parts().values(), strict=True):
                    mine.copy_(new)
                known.steps.copy_(steps)
        known.stamp, known.seen, known.captured = stamp, weight.detach(), known.captured or bool(stamp[-1])
    return known.q, known.steps


def fresh(weight: Tensor, grid: Grid) -> tuple[QTensor[Tensor], Tensor]:
    """As `of`, but made anew and not kept: for weights that are gathered for a moment."""
    steps = torch.empty(grid.scale_shape(tuple(weight.shape)), dtype=torch.float32, device=weight.device)
    return choose.quantize(weight.detach(), grid, steps=steps), steps


def drop(weight: Tensor) -> None:
    """Has the next use make the codes of `weight` anew."""
    if known := _kept.get(id(weight)):
        known.stamp = ()


@dataclass(slots=True)
class _Codes:
    """The codes of one weight; as `values.Entry`."""

    owner: "weakref.ref[Tensor]"
    stamp: tuple[Any, ...]
    q: QTensor[Tensor]
    steps: Tensor
    seen: Tensor
    captured: bool


_kept: dict[int, _Codes] = {}


def _fits(known: _Codes, weight: Tensor) -> bool:
    return (known.q.codes.shape, known.q.codes.device, known.q.dtype) == (weight.shape, weight.device, dtype_of(weight))


def _forget(key: int, _: Any) -> None:
    _kept.pop(key, None)
