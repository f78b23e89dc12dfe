"""The errors that `search` lowers: what the differences of a group's values cost, with and without knowledge of its inputs.

Without inputs, powers: of integers of few bits, large differences, those of clipped weights, count for more than in squares.
With the mean squares of inputs, weighted squares. With their moments, d' H d for the block H of the group, where two errors may
make up for each other.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.grid import Grid
from qkit.reference.moments import Moments, mean_squares
from qkit.reference.products import Doubles, Halves, halves, total

#: Of integers by bits, where nothing is known of inputs; else squares. They are the best on the model of benchmarks/fit_model.py.
POWERS = {2: 4, 3: 3}
WIDEST = 256  #: inputs of a group whose block is used; those of wider ones count by their mean squares


@dataclass(frozen=True, slots=True)
class Objective:
    """The error of the values of cells, and the best scale for given units.

    Attributes:
        weights: of squares, [group, cells].
        blocks: `products.halves` of the moments of each group's inputs, [groups, group, group]; None where they are not known.
        power: of the differences that counts, 2, 3 or 4.
    """

    weights: Doubles
    blocks: Halves | None
    power: int

    def squares(self, d: Doubles) -> Doubles:
        """The weighted sum of squares of differences [group, cells]."""
        return total(self.weights * d * d)

    def error(self, d: Doubles) -> Doubles:
        """The error of each cell."""
        if self.blocks is not None:
            return total(d * self._times(d))
        if self.power == 2:
            return self.squares(d)
        return total(np.abs(d) * d * d if self.power == 3 else d * d * (d * d))

    def quotient(self, x: Doubles, units: Doubles) -> tuple[Doubles, Doubles]:
        """Numerator and denominator of the scale of least error for given units."""
        weighted = self.weights * units if self.blocks is None else self._times(units)
        return total(x * weighted), total(units * weighted)

    def _times(self, d: Doubles) -> Doubles:
        """Each cell's block times its differences, with the same bits everywhere; see `products`."""
        assert self.blocks is not None
        high, low = self.blocks
        groups, group = high.shape[:2]
        by_group = np.ascontiguousarray(d.reshape(group, -1, groups).transpose(2, 0, 1))
        top, rest = halves(by_group, axis=1)
        found = high @ top + (high @ rest + low @ top)
        return np.ascontiguousarray(found.transpose(1, 2, 0)).reshape(d.shape)


def objective(
    moments: NDArray[Any] | Moments | None, shape: tuple[int, int], grid: Grid, blocks: Halves | None
) -> Objective:
    """That of `search` for rows [rows, n] of a weight.

    Raises:
        GridError, RangeError: as `fit`.
    """
    group = grid.group_shape(shape)[-1]
    weights = np.broadcast_to(mean_squares(moments, shape[-1]), shape)
    cells = np.ascontiguousarray(weights.reshape(-1, group).T)
    power = POWERS.get(grid.element.bits, 2) if moments is None and grid.element.kind == "integer" else 2
    return Objective(cells, blocks, power)


def blocks_of(moments: NDArray[Any] | Moments | None, n: int, grid: Grid) -> Halves | None:
    """`products.halves` of the moments of the inputs of each group of `n` inputs; None where they are not known, or too many."""
    whole = moments.source if isinstance(moments, Moments) else moments
    if whole is None or whole.ndim != 2 or grid.group == "tensor":
        return None
    group = grid.group_shape((1, n))[-1]
    if group > WIDEST:
        return None
    places = np.arange(n).reshape(-1, group)
    found = whole[places[:, :, None], places[:, None, :]].astype(np.float64)
    return halves((found + found.transpose(0, 2, 1)) / 2, axis=2)
