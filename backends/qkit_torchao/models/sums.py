"""Sums of the second moments of layers' inputs while a block runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qkit.engines.blocks import Seen
from qkit.grid import Grid


class Sums:
    """Sums of x x' of layers while a block runs. Layers that get one tensor share one sum."""

    def __init__(self, round_to: Callable[[Tensor, Grid], Tensor]) -> None:
        self._round_to = round_to
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._like: dict[str, str] = {}
        self._present: list[tuple[Tensor, Grid | None, str]] = []

    def forget(self) -> None:
        """Begins the next run: tensors of the last one are no longer the same as any."""
        self._present.clear()

    def watch(self, path: str, grid: Grid | None) -> Callable[..., None]:
        """The hook of the layer at `path`."""

        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.add(path, grid, args[0])

        return see

    def add(self, path: str, grid: Grid | None, x: Tensor) -> None:
        """Adds inputs `x` [..., n] of the layer at `path`."""
        like = next((one for tensor, of, one in self._present if tensor is x and of == grid), path)
        self._like.setdefault(path, like)
        self._tokens[path] = self._tokens.get(path, 0) + x.numel() // x.shape[-1]
        if self._like[path] != path:
            return
        self._present.append((x, grid, path))
        rows = (x if grid is None else self._round_to(x, grid)).reshape(-1, x.shape[-1]).float()
        if path not in self._sums:
            self._sums[path] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        self._sums[path].addmm_(rows.T, rows)

    def seen(self) -> dict[str, Seen]:
        """The moments of each layer that ran."""
        found = {}
        for path, like in self._like.items():
            total = self._sums.get(path)
            moments = None if total is None else (total / max(self._tokens[path], 1)).cpu().numpy()
            found[path] = Seen(like, moments, self._tokens[path])
        return found
