"""How one tensor is quantized: an element, a group that shares a scale, and the rule that chooses the scale."""

from dataclasses import dataclass
from math import prod
from typing import Literal

from qkit import element as elements
from qkit.element import READ_RULES, SCALE_RULES, Element, ReadRule, Stored
from qkit.errors import GridError

Group = int | Literal["row", "tensor"]
LONGEST = 1 << 24  #: the longest group; no row of a model is longer
SMALLEST = 16  #: the smallest group that an error message names
NEAREST = 1 << 16  #: the most group sizes that an error message tries, to name one that divides

INTEGER_RULES = tuple(name for name, rule in SCALE_RULES.items() if rule.kind == "integer")


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that a quantized tensor can hold, and how its scales follow from its values.

    Attributes:
        element: an `Element`, or its name.
        group: how many neighbours along the last axis share a scale; `"row"` the whole last axis; `"tensor"` everything.
        scale: the scale rule. Integers: `signed`, `absmax`, `midmax`, or `minmax` (asymmetric, integer zero point).
            Floats: `rceil`, `even`, `floor` (a power of two stored as E8M0), or `nvfp4` (an e4m3 per 16 elements under
            a power of two per tensor). Left out: `signed` to 6 bits, `absmax` at 8, `rceil` for floats. Or one of
            `qkit.element.READ_RULES`: the scales are those of a file, and nothing is quantized onto the grid.

    Raises:
        GridError: no such element, group or rule, or the three do not go together.

    >>> print(Grid("int4", 64))
    int4-g64-signed
    """

    element: Element
    group: Group
    scale: str

    def __init__(self, element: str | Element, group: Group, scale: str | None = None) -> None:
        if isinstance(element, str):
            element = elements.element(element)
        object.__setattr__(self, "element", element)
        object.__setattr__(self, "group", group)
        object.__setattr__(self, "scale", _default_rule(element) if scale is None else scale)
        self._check()

    def _check(self) -> None:
        rules = [name for name, rule in SCALE_RULES.items() if rule.kind == self.element.kind]
        if self.scale not in rules and not (self.read and self.element.kind in READ_RULES[self.scale].kinds):
            raise GridError(f"{self.element} has no scale rule {self.scale!r}: choose one of {', '.join(rules)}")
        is_number = isinstance(self.group, int) and not isinstance(self.group, bool)
        if is_number and int(self.group) > LONGEST:  # an int of thousands of digits is not even printed
            raise GridError(f'group is more than {LONGEST:,}: give a smaller number, "row" or "tensor"')
        if not (is_number and int(self.group) > 0) and self.group not in ("row", "tensor"):
            raise GridError(f'group is {self.group!r}: give a positive number, "row" or "tensor"')
        only = READ_RULES[self.scale].only if self.read else SCALE_RULES[self.scale].only
        if only is not None and (self.element.name, self.group) != only:
            name, group = only
            raise GridError(
                f"{self.scale} scales belong to {name} in groups of {group}, not to {self.element} in {self.group}"
            )

    @property
    def read(self) -> bool:
        """Whether the scales are those of a file, and no rule chooses them."""
        return self.scale in READ_RULES

    @property
    def symmetric(self) -> bool:
        """True where the number 0 has code 0; False where groups have a zero point or a bias."""
        return not (self.has_zeros or self.has_biases)

    @property
    def has_zeros(self) -> bool:
        """Whether each group has an integer zero point."""
        return READ_RULES[self.scale].zeros if self.read else self.scale == "minmax"

    @property
    def has_biases(self) -> bool:
        """Whether each group has a float that is added to code times scale."""
        return self.read and READ_RULES[self.scale].biases

    @property
    def has_tensor_scale(self) -> bool:
        """Whether the scales of groups are e4m3 numbers under a scale of the whole tensor."""
        return self.stored_scales == "e4m3"

    @property
    def stored_scales(self) -> Stored:
        """The type of a group's scale: `float`, or the bits of an `e8m0` or an `e4m3`."""
        if self.read:
            return READ_RULES[self.scale].scales
        if self.element.kind == "integer":
            return "float"
        return "e4m3" if self.scale == "nvfp4" else "e8m0"

    @property
    def by_rows(self) -> bool:
        """Whether the codes of a row depend on that row only."""
        return self.group != "tensor" and self.scale != "nvfp4"

    @property
    def bits_per_scale(self) -> int:
        """Bits stored once per group: a bfloat16, an E8M0 or an e4m3, and a zero point or a bias.

        Floats of read grids count as 16 bits, which most files have.
        """
        scale = 16 if self.stored_scales == "float" else 8
        return scale + self.element.bits * self.has_zeros + 16 * self.has_biases

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of `shape`: same rank, one entry per group.

        >>> Grid("int4", 64).scale_shape((8, 256))
        (8, 4)

        Raises:
            GridError: the tensor is empty or zero-dimensional, or the last axis is not a whole number of groups.
        """
        if not shape or 0 in shape:
            raise GridError(f"cannot quantize an array of shape {shape}: it has no last axis, or no elements")
        if self.group == "tensor":
            return (1,) * len(shape)
        if not self.divides(shape[-1]):
            raise GridError(f"{shape[-1]} inputs do not divide into groups of {self.group}: {self._way_out(shape[-1])}")
        return (*shape[:-1], 1 if self.group == "row" else shape[-1] // int(self.group))

    def divides(self, inputs: int) -> bool:
        """Whether a last axis of so many elements is a whole number of groups."""
        return not isinstance(self.group, int) or inputs % self.group == 0

    def smaller_groups(self, inputs: int) -> str:
        """The groups in place of this grid's that a last axis of so many elements divides into, as words; empty: none.

        Groups of small floats are those of their formats, so that there are no others. Under 16, scales would outweigh codes.
        """
        if self.element.kind == "float" or not isinstance(self.group, int):
            return ""
        largest = min(self.group - 1, inputs, NEAREST)
        size = next((size for size in range(largest, SMALLEST - 1, -1) if inputs % size == 0), None)
        return f'group {size} or "row"' if size else '"row"'

    def _way_out(self, inputs: int) -> str:
        if use := self.smaller_groups(inputs):
            return f"use {use}"
        return f"give it a multiple of {self.group} inputs, or leave it in float"

    def group_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `shape` with the elements of each group along a new last axis: `scale_shape(shape)` and the group."""
        scales = self.scale_shape(shape)
        return (*scales, prod(shape) // prod(scales))

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Stored bits per element of a tensor of `shape`, scales and zero points included."""
        extra = 32 if self.has_tensor_scale else 0
        return self.element.bits + (prod(self.scale_shape(shape)) * self.bits_per_scale + extra) / prod(shape)

    @classmethod
    def parse(cls, text: str) -> "Grid":
        """The grid that prints as `text`: the inverse of `str`.

        Raises:
            GridError: no grid prints as `text`.

        >>> Grid.parse("int4-g64-signed") == Grid("int4", 64)
        True
        """
        element, _, rest = text.partition("-")
        group, _, scale = rest.partition("-")
        size = group.removeprefix("g")
        grid = cls(element, int(size) if size.isdecimal() else group, scale)  # type: ignore[arg-type]  # checked there
        if str(grid) != text:
            raise GridError(f"no grid prints as {text!r}: write {str(grid)!r}")
        return grid

    def __str__(self) -> str:
        group = f"g{self.group}" if isinstance(self.group, int) else self.group
        return f"{self.element}-{group}-{self.scale}"


def want_grid(value: object) -> None:
    """Refuses a value that is no grid.

    Raises:
        GridError: the message says what a grid is, and how to get one.
    """
    if not isinstance(value, Grid):
        raise GridError(
            f"{value!r} is no grid, which is an element, a group and a scale rule: write qkit.Grid('int4', 64), or take "
            "the one of a rule, such as qkit.recipe('int4-g64').rules[-1].weight"
        )


def read_rule(grid: Grid) -> ReadRule:
    """The entry of `grid` in `READ_RULES`.

    Raises:
        GridError: its scales are chosen.
    """
    if not grid.read:
        raise GridError(f"{grid} is no read grid: its scales follow from {grid.scale}")
    return READ_RULES[grid.scale]


def want_chosen(grid: Grid) -> None:
    """Refuses a read grid where scales would have to be chosen.

    Raises:
        GridError: the message says why, and which grid is near.
    """
    want_grid(grid)
    if grid.read:
        near = Grid(
            grid.element, grid.group, "minmax" if grid.element.kind == "integer" and not grid.symmetric else None
        )
        raise GridError(
            f"{grid} is a read grid: its scales are those of a file that another program wrote, and qkit has no rule that "
            f"would choose them: quantize on another grid, such as {near}, or train adapters on the model as it is"
        )


def _default_rule(element: Element) -> str:
    if element.kind == "float":
        return "rceil"
    return "absmax" if element.bits == 8 else "signed"
