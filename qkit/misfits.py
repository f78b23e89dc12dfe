"""Layers whose widths do not divide into the groups of a recipe's grids, refused together in one message."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Final

from qkit.engines.layer import Layer
from qkit.errors import GridError
from qkit.grid import Grid
from qkit.path_patterns import collapse
from qkit.rules import Rule

FEW: Final = 24  #: the most paths of one width that a message lists one by one
WAY_OUT: Final = (
    'to leave them in float, add --skip-indivisible (Python: skip_indivisible=True; a recipe: indivisible = "skip")'
)


@dataclass(frozen=True, slots=True)
class Width:
    """An axis of a weight that a grid cuts into groups.

    Attributes:
        path: of the weight's layer; of experts with the name of the projection.
        size: the length of the axis.
        side: `inputs`, or `outputs` for a grid of outputs.
    """

    path: str
    size: int
    side: str
    grid: Grid

    @property
    def fits(self) -> bool:
        """Whether the axis is a whole number of groups."""
        return self.grid.divides(self.size)

    def __str__(self) -> str:
        return f"{self.size} {self.side} do not divide into groups of {self.grid.group}"


def widths(layer: Layer, rule: Rule) -> Iterator[Width]:
    """Every axis of the weights of `layer` that a grid of `rule` cuts into groups.

    Raises:
        GridError: a weight is empty.
    """
    for name, shape in layer.weights.items():
        path = layer.path if name == "weight" else f"{layer.path}.{name}"
        if not shape or 0 in shape:
            raise GridError(f"{path}: cannot quantize an array of shape {shape}: it has no last axis, or no elements")
        for grid, size, side in (
            (rule.weight, shape[-1], "inputs"),
            (rule.activation, shape[-1], "inputs"),
            (rule.output, shape[0], "outputs"),
        ):
            if grid:
                yield Width(path, size, side, grid)


def want_whole_groups(found: Sequence[Width]) -> None:
    """Refuses, in one message, every layer that does not divide into groups.

    Args:
        found: all axes of the layers that the recipe quantizes, also those that fit: a smaller group must suit them all.

    Raises:
        GridError: it lists the layers, and names the way out.
    """
    misfits: dict[str, list[str]] = {}
    for one in found:
        if not one.fits:
            misfits.setdefault(str(one), []).append(one.path)
    if not misfits:
        return
    said = "; ".join(f"{_names(paths)}: {reason}" for reason, paths in misfits.items())
    grids = {one.grid for one in found if not one.fits}
    common = gcd(*(one.size for one in found if one.grid in grids))
    others = {grid.smaller_groups(common) for grid in grids}
    other = f"; or use {others.pop()}" if len(others) == 1 and "" not in others else ""
    raise GridError(f"{said}: {WAY_OUT}{other}")


def _names(paths: Sequence[str]) -> str:
    """Paths, each once; many of them as patterns."""
    once = list(dict.fromkeys(paths))
    return ", ".join(once if len(once) <= FEW else collapse(once))
