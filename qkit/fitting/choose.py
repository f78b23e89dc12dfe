"""The choice of a grid for each group of layers that does the least harm within a number of bytes: dynamic programming."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qkit.errors import PlanError

STATES = 1 << 16  #: sums of bytes that are told apart; beyond, costs are rounded up to fewer


@dataclass(frozen=True, slots=True)
class Choice:
    """Layers that share a grid, and one grid for them.

    Attributes:
        grid: number of the recipe.
        nbytes: of their tensors in the output.
        harm: estimated, in nats for each token.
    """

    grid: int
    nbytes: int
    harm: float


def choose(choices: Sequence[Sequence[Choice]], capacity: int) -> list[Choice]:
    """One of each of `choices`, with the least sum of harms among all whose bytes together are at most `capacity`.

    Exact while the sums of bytes take at most `STATES` values; beyond, each size counts as a multiple of more bytes.

    Raises:
        PlanError: the least bytes are more.
    """
    least = sum(min(one.nbytes for one in mine) for mine in choices)
    if least > capacity:
        raise PlanError(f"{capacity:,} bytes for the quantized layers are too few: the least possible are {least:,}")
    unit = 1
    while (found := _choose(choices, capacity, unit)) is None:
        unit = 2 * unit if unit > 1 else max(2, capacity // STATES)
    return found


def _choose(choices: Sequence[Sequence[Choice]], capacity: int, unit: int) -> list[Choice] | None:
    """As `choose`, with sizes in multiples of `unit`; None where there are too many sums, or rounding up leaves no choice."""
    sizes, harms = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
    for mine in choices:
        costs = np.array([-(-one.nbytes // unit) * unit for one in mine], np.int64)
        every = (sizes[:, None] + costs).ravel()
        total = (harms[:, None] + np.array([one.harm for one in mine])).ravel()
        order = np.lexsort((total, every))
        order = order[every[order] <= capacity + unit * len(choices) * (unit > 1)]
        least = np.minimum.accumulate(total[order])
        kept = order[np.concatenate([[True], least[1:] < least[:-1]])]  # dearer sums that are no better are out
        sizes, harms = every[kept], total[kept]
        steps.append(((kept // len(mine)).astype(np.int32), (kept % len(mine)).astype(np.int32)))
        if len(kept) > STATES:
            return None
    for end in range(len(sizes) - 1, -1, -1):
        place, found = end, []
        for mine, (before, which) in zip(reversed(choices), reversed(steps), strict=True):
            found.append(mine[which[place]])
            place = int(before[place])
        if sum(one.nbytes for one in found) <= capacity:
            return found[::-1]
    return None
