"""The error that `search` lowers: the cost of the differences d of a group's values x, with and without knowledge of its inputs.

d' B d + PULL (d' B x)^2 / x' B x. B is the block of the group in the moments of the inputs, where two errors may make up for each
other, or their mean squares; or one for every input. The second term counts the part of d that lies along x. Errors of groups
are independent but for this part: the best scale for each group alone clips, so that all of them shrink, and a layer with them.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.grid import Grid
from qkit.reference.moments import Moments, mean_squares
from qkit.reference.products import Doubles, shortened, total

#: Of integers by bits, and of others; small floats clip little, and have none. Chosen on text that no figure is measured on.
PULL = {2: 3.0}
PULL_OF_WIDE = 1.0
#: Of the mean square of all inputs, added to that of each, by bits: a group knows nothing of the errors of others. Else 0.
DAMPING = {2: 1.0}
WIDEST = 256  #: inputs of a group whose block is used; those of wider ones count by their mean squares


@dataclass(frozen=True, slots=True)
class Objective:
    """The error of the values of cells, and the best scale for given units.

    Attributes:
        x: the values [group, cells].
        weights: of squares, [group, cells].
        blocks: `products.shortened` moments of each group's inputs, [groups, group, group]; None where they are not known.
        damping: what B has more on its diagonal than these blocks or weights.
        pull: the weight of errors along x.
        along: B x [group, cells].
        size: x' B x of each cell, one where it is zero.
    """

    x: Doubles
    weights: Doubles
    blocks: Doubles | None
    damping: float
    pull: float
    along: Doubles = field(init=False)
    size: Doubles = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "along", self._times(self.x))
        size = total(self.x * self.along)
        object.__setattr__(self, "size", np.where(size > 0, size, 1.0))

    def squares(self, d: Doubles) -> Doubles:
        """The weighted sum of squares of differences [group, cells]."""
        return total(self.weights * d * d)

    def error(self, d: Doubles) -> Doubles:
        """The error of each cell."""
        part = total(d * self.along)
        return total(d * self._times(d)) + self.pull * (part * part / self.size)

    def quotient(self, units: Doubles) -> tuple[Doubles, Doubles]:
        """Numerator and denominator of the scale of least error for given units."""
        part = total(units * self.along)
        own = total(units * self._times(units))
        return (1 + self.pull) * part, own + self.pull * (part * part / self.size)

    def _times(self, d: Doubles) -> Doubles:
        """Each cell's B times `d`, with the same bits everywhere; see `products`."""
        if self.blocks is None:
            return self.weights * d + self.damping * d
        groups, group = self.blocks.shape[:2]
        by_group = np.ascontiguousarray(d.reshape(group, -1, groups).transpose(2, 0, 1))
        found = self.blocks @ shortened(by_group, axis=1)
        return np.ascontiguousarray(found.transpose(1, 2, 0)).reshape(d.shape) + self.damping * d


def objective(moments: NDArray[Any] | Moments | None, x: Doubles, grid: Grid, blocks: Doubles | None) -> Objective:
    """That of `search` for rows `x` [rows, n] of a weight.

    Raises:
        GridError, RangeError: as `fit`.
    """
    group = grid.group_shape(x.shape)[-1]
    diagonal = mean_squares(moments, x.shape[-1])
    weights = cells(np.broadcast_to(diagonal, x.shape), group)
    damping = 0.0 if moments is None else damping_of(grid, diagonal)
    return Objective(cells(x, group), weights, blocks, damping, pull_of(grid))


def damping_of(grid: Grid, diagonal: Doubles) -> float:
    """The damping: a number added to the diagonal of the blocks of known inputs, given their mean squares [n]."""
    if grid.element.kind == "float":
        return 0.0
    return DAMPING.get(grid.element.bits, 0.0) * float(total(diagonal)) / len(diagonal)


def pull_of(grid: Grid) -> float:
    """The weight of errors along the values of a cell."""
    return PULL.get(grid.element.bits, PULL_OF_WIDE) if grid.element.kind == "integer" else 0.0


def cells(x: Doubles, group: int) -> Doubles:
    """[rows, n] -> [group, rows * groups]."""
    return np.ascontiguousarray(x.reshape(-1, group).T)


def blocks_of(moments: NDArray[Any] | Moments | None, n: int, grid: Grid) -> Doubles | None:
    """`products.shortened` moments of the inputs of each group of `n` inputs; None where they are not known, or too many."""
    whole = moments.source if isinstance(moments, Moments) else moments
    if whole is None or whole.ndim != 2 or grid.group == "tensor":
        return None
    group = grid.group_shape((1, n))[-1]
    if group > WIDEST:
        return None
    places = np.arange(n).reshape(-1, group)
    found = whole[places[:, :, None], places[:, None, :]].astype(np.float64)
    return shortened((found + found.transpose(0, 2, 1)) / 2, axis=2)
