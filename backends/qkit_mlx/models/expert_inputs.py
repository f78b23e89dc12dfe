"""The inputs of each expert of a float model: a stand-in for each stack of mlx-lm sorts them by expert."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qkit.engines.blocks import Mixture
from qkit.grid import Grid
from qkit_mlx.layers.experts import parts

__all__ = ["parts", "watching"]


class Add(Protocol):
    """Takes the inputs `x` [tokens, n] of one expert, which are those of the one at `like`."""

    def __call__(self, path: str, grid: Grid | None, x: mx.array, *, like: str) -> None: ...


@contextmanager
def watching(mixtures: Sequence[tuple[Any, Mixture]], add: Add) -> Iterator[None]:
    """Within, the stacks of each block of experts give the inputs of their experts to `add`."""
    before: list[tuple[Any, str, Any]] = []
    try:
        for block, mixture in mixtures:
            names, seen = {id(part): name for name, part in block.items()}, _Last()
            for projection, part in parts(block).items():
                paths = {number: path for (number, name), path in mixture.paths.items() if name == projection}
                before.append((block, names[id(part)], part))
                block[names[id(part)]] = _Watched(part, paths, mixture.grid, seen, add)
        yield
    finally:
        for block, name, part in before:
            block[name] = part


class _Last:
    """The input that a stack of a block saw last, and the paths of its experts."""

    x: mx.array | None = None
    paths: Mapping[int, str] = {}


class _Watched(nn.Module):
    """In the place of a stack: runs it, and shows the inputs of each expert."""

    def __init__(self, stack: Any, paths: Mapping[int, str], grid: Grid | None, seen: _Last, add: Add) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = stack
        object.__setattr__(self, "_given", (paths, grid, seen, add))  # a module would take it for parameters

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        paths, grid, seen, add = self._given
        if seen.x is not x:
            seen.x, seen.paths = x, paths
        rows = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:])).reshape(-1, x.shape[-1])
        numbers = np.array(indices).reshape(-1)
        for number in np.unique(numbers).tolist():
            mine = rows[mx.array(np.flatnonzero(numbers == number))]
            add(paths[number], grid, mine, like=seen.paths[number])
        out: mx.array = self.stack(x, indices, sorted_indices=sorted_indices)
        return out
