"""What an adapter is: the wish of one (`Adapter`), and one layer's arrays (`Update`)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qkit.errors import QkitError

Kind = Literal["lora", "dora"]
KINDS: tuple[Kind, ...] = ("lora", "dora")
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Adapter:
    """Adapters to be put on the linear layers whose path matches.

    Attributes:
        rank: of the product that is added to each weight.
        alpha: the product is scaled by `alpha / rank`.
        kind: `lora` (Hu et al., 2021), or `dora` (Liu et al., 2024), which trains the length of every row besides.
        match: shell patterns for the dotted path of a layer; one that matches is enough.
        seed: of the first values of A. Those of B are zero, so that training starts from the base.
    """

    rank: int = 8
    alpha: float = 16.0
    kind: Kind = "lora"
    match: tuple[str, ...] = ("*",)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise QkitError(f"adapter kind is {self.kind!r}: choose one of {', '.join(KINDS)}")
        if type(self.rank) is not int or self.rank < 1:
            raise QkitError(f"adapter rank is {self.rank!r}: give a whole number from 1 on, such as 8")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < float("inf"):
            raise QkitError(f"adapter alpha is {self.alpha!r}: give a positive number, such as twice the rank")
        if type(self.seed) is not int or self.seed < 0:
            raise QkitError(f"adapter seed is {self.seed!r}: give a whole number from 0 on")
        if (
            type(self.match) is not tuple
            or not self.match
            or not all(isinstance(one, str) and one for one in self.match)
        ):
            raise QkitError(f"adapter match is {self.match!r}: give a tuple of patterns, such as ('*',)")


def adapter_from_table(table: Mapping[str, Any]) -> Adapter:
    """The adapter that a table of a TOML or JSON file wishes for; a list of patterns, or one, is fine.

    Raises:
        QkitError: a key is unknown, or a value makes no sense.
    """
    known = [field.name for field in fields(Adapter)]
    for key in table:
        if key not in known:
            raise QkitError(f"unknown key {key!r} in an adapter: there is {', '.join(known)}")
    match = table.get("match", "*")
    given = (match,) if isinstance(match, str) else tuple(match) if isinstance(match, list) else match
    return Adapter(**{**table, "match": given})


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """The adapter of one layer, as NumPy arrays: the merged weight is W + scale * B A, see `arithmetic.merged`.

    Attributes:
        a: float32 [rank, inputs].
        b: float32 [outputs, rank].
        scale: what the product is multiplied by.
        magnitude: `dora` only: float32 [outputs], the length of each row of the merged weight.

    Raises:
        QkitError: shapes do not fit each other, or a value is not finite.
    """

    a: Floats
    b: Floats
    scale: float
    magnitude: Floats | None = None

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or len(self.a) != self.b.shape[1] or not len(self.a):
            raise QkitError(
                f"an adapter's A is {self.a.shape} and its B {self.b.shape}: want [rank, inputs], [outputs, rank]"
            )
        if self.magnitude is not None and self.magnitude.shape != (len(self.b),):
            raise QkitError(
                f"an adapter's magnitude is {self.magnitude.shape} and its B {self.b.shape}: want [outputs]"
            )
        if not np.isfinite(self.scale) or not all(np.isfinite(array).all() for array in self.parts().values()):
            raise QkitError("an adapter holds a NaN or an infinity: find what made it before you use it")

    @property
    def kind(self) -> Kind:
        """`lora` or `dora`."""
        return "lora" if self.magnitude is None else "dora"

    @property
    def rank(self) -> int:
        """Of the product."""
        return len(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it updates: (outputs, inputs)."""
        return len(self.b), self.a.shape[1]

    def parts(self) -> dict[str, Floats]:
        """The arrays by name, without the absent one."""
        named: dict[str, Any] = {"a": self.a, "b": self.b, "magnitude": self.magnitude}
        return {name: array for name, array in named.items() if array is not None}
