"""Tables on the device that tell each program of one launch over many tensors its part, and where AdamW writes values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkit.grid import Grid
from qkit_torchao.kernels import graphs

CACHED = 64  #: the most tables that are cached
_tables: dict[Any, Tensor] = {}
_captured: list[Tensor] = []  #: tables that captured graphs read at every replay, on the device or on the host


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A tensor for the values of a weight on `grid`, which are the weight itself where `gate`, bool [], is off."""

    values: Tensor
    grid: Grid
    gate: Tensor


def offsets(tensors: Sequence[Tensor]) -> list[int]:
    """The places of `tensors` of one type, in elements from the first of them on."""
    base, size = tensors[0].data_ptr(), tensors[0].element_size()
    return [(tensor.data_ptr() - base) // size for tensor in tensors]


def programs(
    rows: tuple[tuple[int, ...], ...],
    counts: tuple[int, ...],
    advances: tuple[int, ...],
    geometry: dict[str, int],
    device: torch.device,
) -> tuple[Tensor, bool]:
    """One row for each program of a launch over many tensors, int64 on the device, and whether each has a full tile.

    Args:
        rows: for each tensor, places and addresses.
        counts: for each tensor, its groups. Rows end with the count of groups from the program's first to the last.
        advances: for each column, 1 if it advances with the elements, else 0.
    """
    groups, group = geometry["GROUPS"], geometry["GROUP"]
    full = geometry["WIDTH"] == group and all(count % groups == 0 for count in counts)

    def table() -> np.ndarray[Any, Any]:
        number = [-(-count // groups) for count in counts]
        first = np.concatenate([np.arange(n, dtype=np.int64) for n in number]) * groups
        places = np.repeat(np.array(rows, np.int64), number, axis=0)
        places += (first * group)[:, None] * np.array(advances)
        left = np.repeat(np.array(counts, np.int64), number) - first
        return np.concatenate([places, left[:, None]], axis=1)

    return on_device((rows, counts, groups, group), table, device), full


def on_device(key: Any, make: Callable[[], np.ndarray[Any, Any]], device: torch.device) -> Tensor:
    """The table that `make` computes from the contents of `key`, on `device`. The host does not wait for the copy.

    Tables are cached, since the next step is likely to need the same. A table computed while a graph is captured is not cached:
    its memory is the graph's, which copies the table again at every replay.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    cached = _tables.get((key, device))
    if cached is None:
        table = torch.from_numpy(make())
        if device.type != "cuda":
            return table
        pinned = table.pin_memory()
        if capturing:
            _captured.append(pinned)
            return pinned.to(device, non_blocking=True)
        cached = graphs.lasting(partial(torch.empty_like, table, device=device)).copy_(pinned, non_blocking=True)
        if len(_tables) >= CACHED:
            _tables.pop(next(iter(_tables)))
        _tables[key, device] = cached
    elif capturing:
        _captured.append(cached)
    return cached
