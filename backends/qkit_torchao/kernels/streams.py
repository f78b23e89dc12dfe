"""Parts of a computation side by side on one GPU: products of one part fill the time in which another waits for memory."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


def side_by_side(
    work: Callable[[Part], tuple[Tensor, ...]], parts: Sequence[Part], device: torch.device, *, streams: int
) -> list[tuple[Tensor, ...]]:
    """The results of `work` for each of `parts`, in their order; each runs in a thread, on a stream of its own."""
    caller, own = torch.cuda.current_stream(device), _streams(device, streams)

    def run(number: int) -> tuple[Tensor, ...]:
        stream = own[number % streams]
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(stream):
            stream.wait_stream(caller)
            found = work(parts[number])
        caller.wait_stream(stream)
        for tensor in found:
            tensor.record_stream(caller)
        return found

    with ThreadPoolExecutor(streams) as threads:
        return list(threads.map(run, range(len(parts))))


@cache
def _streams(device: torch.device, count: int) -> list[Any]:
    """Streams that are used again and again: each keeps the memory that was freed on it."""
    with torch.cuda.device(device):
        return [torch.cuda.Stream() for _ in range(count)]
