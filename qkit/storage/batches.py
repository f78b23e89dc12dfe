"""Many items as few tasks, and tasks on all cores: a task of its own for each small tensor would cost more than its work."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Final, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

BYTES: Final = 1 << 24  #: bytes of tensors that make a batch
ITEMS: Final = 256  #: most items of a batch


def batches(items: Iterable[Item], nbytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    """`items` in batches of at least `BYTES` or of `ITEMS` items; the last has the rest."""
    batch, left = list[Item](), BYTES
    for item in items:
        batch.append(item)
        left -= nbytes(item)
        if left <= 0 or len(batch) == ITEMS:
            yield batch
            batch, left = [], BYTES
    if batch:
        yield batch


def in_turn(
    items: Iterable[Item], nbytes: Callable[[Item], int], *, group: Callable[[Item], str]
) -> Iterator[list[Item]]:
    """As `batches`, each of items of one group, and from the groups in turn.

    With the group of its file for each tensor, threads write different files: a system lets one at a time write into a file.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(group(item), []).append(item)
    turns = zip_longest(*(batches(members, nbytes) for members in groups.values()))
    return (batch for turn in turns for batch in turn if batch)


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results of `work` in the order of `items`, on all cores. The first error ends all work.

    For work in calls that release the interpreter lock: reading, writing, digests, NumPy on large arrays.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
