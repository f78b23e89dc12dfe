"""Tables that tell the programs of one launch over many tensors what each is to do. On the device, where they are kept."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkit_torchao.kernels import graphs

KEPT = 64  #: how many tables are kept
_tables: dict[Any, Tensor] = {}
_captured: list[Tensor] = []  #: what captured graphs read at every replay, here and on the host


def offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Where `tensors` of one type are, in elements from the first of them on."""
    base, size = tensors[0].data_ptr(), tensors[0].element_size()
    return [(tensor.data_ptr() - base) // size for tensor in tensors]


def programs(
    rows: tuple[tuple[int, ...], ...],
    counts: tuple[int, ...],
    moves: tuple[int, ...],
    geometry: dict[str, int],
    device: torch.device,
) -> tuple[Tensor, bool]:
    """One row for each program of a launch over many tensors, int64 on the device, and whether each has a full tile.

    Args:
        rows: of each tensor: places and addresses.
        counts: of each tensor: how many groups. Rows end with how many are left from the program's first on.
        moves: of each column, whether it moves on with the elements.
    """
    groups, group = geometry["GROUPS"], geometry["GROUP"]
    full = geometry["WIDTH"] == group and all(count % groups == 0 for count in counts)

    def table() -> np.ndarray[Any, Any]:
        number = [-(-count // groups) for count in counts]
        first = np.concatenate([np.arange(n, dtype=np.int64) for n in number]) * groups
        made = np.repeat(np.array(rows, np.int64), number, axis=0)
        made += (first * group)[:, None] * np.array(moves)
        left = np.repeat(np.array(counts, np.int64), number) - first
        return np.concatenate([made, left[:, None]], axis=1)

    return on_device((rows, counts, groups, group), table, device), full


def on_device(key: Any, make: Callable[[], np.ndarray[Any, Any]], device: torch.device) -> Tensor:
    """The table that `make` makes of what is in `key`, on `device`, without waiting.

    It is kept, since the same is likely to be asked for again; but not one made while a graph is captured, for its memory is the
    graph's, which copies it anew at every replay.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    made = _tables.get((key, device))
    if made is None:
        table = torch.from_numpy(make())
        if device.type != "cuda":
            return table
        pinned = table.pin_memory()
        if capturing:
            _captured.append(pinned)
            return pinned.to(device, non_blocking=True)
        made = graphs.lasting(partial(torch.empty_like, table, device=device)).copy_(pinned, non_blocking=True)
        if len(_tables) >= KEPT:
            _tables.pop(next(iter(_tables)))
        _tables[key, device] = made
    elif capturing:
        _captured.append(made)
    return made
