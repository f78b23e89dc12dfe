"""Sums of the second moments of layers' inputs while a block runs."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qkit.engines.blocks import Seen
from qkit.grid import Grid


class Sums:
    """Sums of x x' of layers while a block runs. Layers that get one array share one sum."""

    def __init__(self, round_to: Callable[[mx.array, Grid], mx.array]) -> None:
        self._round_to = round_to
        self._sums: dict[str, mx.array] = {}
        self._tokens: dict[str, int] = {}
        self._like: dict[str, str] = {}
        self._present: list[tuple[mx.array, Grid | None, str]] = []

    def forget(self) -> None:
        """Begins the next run: arrays of the last one are no longer the same as any."""
        self._present.clear()

    def arrays(self) -> list[mx.array]:
        """The sums, to be computed."""
        return list(self._sums.values())

    def see(self, path: str, grid: Grid | None, x: mx.array, _: mx.array) -> None:
        """Adds the inputs `x` [..., n] of the layer at `path`."""
        like = next((one for array, of, one in self._present if array is x and of == grid), path)
        self._present.append((x, grid, path))
        self.add(path, grid, x, like=like)

    def add(self, path: str, grid: Grid | None, x: mx.array, *, like: str) -> None:
        """Adds the inputs `x` [..., n] of the layer at `path`, which are those of the layer `like`."""
        self._like.setdefault(path, like)
        self._tokens[path] = self._tokens.get(path, 0) + x.size // x.shape[-1]
        if self._like[path] != path:
            return
        rows = (x if grid is None else self._round_to(x, grid)).reshape(-1, x.shape[-1]).astype(mx.float32)
        total = rows.T @ rows
        self._sums[path] = self._sums[path] + total if path in self._sums else total

    def seen(self) -> dict[str, Seen]:
        """The moments of each layer that ran."""
        found = {}
        for path, like in self._like.items():
            total = self._sums.get(path)
            moments = None if total is None else np.array(total / max(self._tokens[path], 1))
            found[path] = Seen(like, moments, self._tokens[path])
        return found


def product(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """See `qkit.engines.blocks.Blocks.product`."""
    return np.array(mx.array(x).T @ mx.array(y))
