"""`Adapter`: the low-rank adapters that a user asks for. `qkit.reference.merged.Update` has the arrays of one layer."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from qkit.errors import QkitError
from qkit.grid import Grid
from qkit.reference.merged import KINDS, Kind

Scales = Literal["learned", "stored"]
SCALES: tuple[Scales, ...] = ("learned", "stored")
COARSE, WIDER = 2, 2  #: bits of integers, up to which products are wider than their rank; and how many times


@dataclass(frozen=True, slots=True)
class Adapter:
    """Adapters for the linear layers whose path matches.

    Attributes:
        rank: of the product that is added to each weight.
        alpha: the product is scaled by `alpha / rank`.
        kind: `lora` (Hu et al., 2021), or `dora` (Liu et al., 2024), which also trains the length of every row.
        match: shell patterns for the dotted path of a layer; one that matches is enough.
        seed: the seed of A's first values. B starts at zero, so that training starts from the base weights.
        beside: for `qkit train` on packed codes: the share of the steps that trains the product beside the decoded base, before
            the rest trains on the grid.
        factor: for `qkit train` on packed codes: multiplies the learning rate of the steps on the grid.
        scales: of layers of codes: `learned` trains gains of scales and biases beside the factors, see `qkit.reference.gains`;
            `stored` leaves scales to the file, or to the rule of the grid. None learns those of read grids, and those of codes of
            up to 3 bits, where it can.
        norms: `learned` trains the float32 weights and biases of norms around adapted layers, too; `stored` leaves them alone.
            None learns them beside layers of codes.
        wider: of linear layers of codes: the product has `wider` times as many columns as `rank`. Merged they cost nothing.
            None: 2 on integers of 2 bits, whose values are too coarse for the columns of `rank`; 1 on others.
    """

    rank: int = 8
    alpha: float = 16.0
    kind: Kind = "lora"
    match: tuple[str, ...] = ("*",)
    seed: int = 0
    beside: float = 0.25
    factor: float = 1.0
    scales: Scales | None = None
    norms: Scales | None = None
    wider: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise QkitError(f"adapter kind is {self.kind!r}: choose one of {', '.join(KINDS)}")
        if type(self.rank) is not int or self.rank < 1:
            raise QkitError(f"adapter rank is {self.rank!r}: give a whole number from 1 on, such as 8")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < float("inf"):
            raise QkitError(f"adapter alpha is {self.alpha!r}: give a positive number, such as twice the rank")
        if type(self.seed) is not int or self.seed < 0:
            raise QkitError(f"adapter seed is {self.seed!r}: give a whole number from 0 on")
        if type(self.beside) not in (int, float) or not 0 <= self.beside < 1:
            raise QkitError(
                f"adapter beside is {self.beside!r}: give a share of the steps from 0 on, below 1, such as 0.25"
            )
        if type(self.factor) not in (int, float) or not 0 < self.factor < float("inf"):
            raise QkitError(f"adapter factor is {self.factor!r}: give a positive number, such as 2")
        for name, choice in (("scales", self.scales), ("norms", self.norms)):
            if choice not in (None, *SCALES):
                raise QkitError(f"adapter {name} is {choice!r}: choose one of {', '.join(SCALES)}, or leave it out")
        if self.wider is not None and (type(self.wider) is not int or self.wider < 1):
            raise QkitError(f"adapter wider is {self.wider!r}: give a whole number from 1 on, or leave it out")
        if (
            type(self.match) is not tuple
            or not self.match
            or not all(isinstance(one, str) and one for one in self.match)
        ):
            raise QkitError(f"adapter match is {self.match!r}: give a tuple of patterns, such as ('*',)")

    def columns(self, grid: Grid) -> int:
        """The columns of the product on a linear layer of codes on `grid`, if its weight has as many rows and columns."""
        coarse = grid.element.kind == "integer" and grid.element.bits <= COARSE
        return self.rank * (self.wider or (WIDER if coarse else 1))


def adapter_from_table(table: Mapping[str, Any]) -> Adapter:
    """The adapter that a table of a TOML or JSON file describes; `match` is a pattern or a list of them.

    Raises:
        QkitError: a key is unknown, or a value is out of range.
    """
    known = [field.name for field in fields(Adapter)]
    for key in table:
        if key not in known:
            raise QkitError(f"unknown key {key!r} in an adapter: there is {', '.join(known)}")
    match = table.get("match", "*")
    given = (match,) if isinstance(match, str) else tuple(match) if isinstance(match, list) else match
    return Adapter(**{**table, "match": given})
