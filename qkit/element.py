"""How one number is stored, and which scale rules there are. All numeric constants are here; engines read them from here."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from qkit.errors import GridError

MIN_SCALE: Final = 2.0**-96  #: the smallest magnitude of an integer scale; a group of zeros gets it
MIN_SCALE_CODE: Final = 32  #: E8M0 codes are clipped to 32..253: three libraries mishandle the codes 0 and 255
MAX_SCALE_CODE: Final = 253
MIN_BLOCK_SCALE: Final = 2.0**-9  #: the smallest NVFP4 block scale: the smallest positive e4m3
AVERAGE: Final = 0.01  #: the weight of each training step in a running average of activation ranges
LIMIT: Final = 2.0**127  #: magnitudes from here on are refused: their rounded value may be infinite


Kind = Literal["integer", "float"]
Stored = Literal["float", "e8m0", "e4m3"]


def reciprocal(x: float) -> float:
    """1/x, rounded to the nearest float32. A scale is a product with it, never a quotient.

    >>> reciprocal(7.0).hex()
    '0x1.24924a0000000p-3'
    """
    return float(struct.unpack("<f", struct.pack("<f", 1.0 / x))[0])


@dataclass(frozen=True, slots=True)
class Element:
    """One stored number: an integer of `bits` bits, or a small float of the OCP or NVIDIA formats.

    Attributes:
        name: `int4`, `e2m1`, ...
        kind: `integer` (two's complement range) or `float` (sign, exponent, mantissa; finite values only).
        bits: width of one code.
        largest: the largest representable value; for a float 6, 448 or 57344.
        mantissa: explicit mantissa bits of a float, 0 for an integer.
        min_exponent: exponent of a float's smallest normal number, 0 for an integer.
    """

    name: str
    kind: Kind
    bits: int
    largest: float
    mantissa: int = 0
    min_exponent: int = 0

    @property
    def lowest(self) -> int:
        """The most negative code of a symmetric integer: -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The most positive code of a symmetric integer: 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def levels(self) -> int:
        """How many codes there are, less one: 2^bits - 1, the highest code of an asymmetric integer."""
        return (1 << self.bits) - 1

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest value of a float: 2 (e2m1), 8 (e4m3), 15 (e5m2); OCP MX 1.0 calls it emax."""
        return int(self.largest).bit_length() - 1

    def __str__(self) -> str:
        return self.name


def _integer(bits: int) -> Element:
    return Element(f"int{bits}", "integer", bits, (1 << (bits - 1)) - 1)


#: Every element that qkit stores, and the only list of widths. Other lists name widths of one kernel or other program.
ELEMENTS: Final = {
    element.name: element
    for element in (
        *map(_integer, (2, 3, 4, 5, 6, 8)),
        Element("e2m1", "float", 4, 6.0, mantissa=1, min_exponent=0),
        Element("e4m3", "float", 8, 448.0, mantissa=3, min_exponent=-6),
        Element("e5m2", "float", 8, 57344.0, mantissa=2, min_exponent=-14),
    )
}
INTEGERS: Final = tuple(element for element in ELEMENTS.values() if element.kind == "integer")
FLOATS: Final = tuple(element for element in ELEMENTS.values() if element.kind == "float")


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """How the scale of a group follows from the group's values. `reference/scale_rules.py` has the function of each rule.

    Attributes:
        kind: of the elements that the rule belongs to.
        multiplier: the law R2: the rule multiplies a group's peak (its span, under `minmax`) by this number of an element.
            None: the rule looks at exponents only.
        only: the one element and the one group size that the rule belongs to. None: every one.
    """

    kind: Kind
    multiplier: Callable[[Element], float] | None = None
    only: tuple[str, int] | None = None


#: Every scale rule of integers and of small floats, by name. Grids accept these rules and `READ_RULES`, and no others.
SCALE_RULES: Final = {
    "signed": ScaleRule("integer", lambda e: 1 / e.lowest),
    "absmax": ScaleRule("integer", lambda e: reciprocal(e.highest)),
    "midmax": ScaleRule("integer", lambda e: reciprocal(e.highest + 0.5)),
    "minmax": ScaleRule("integer", lambda e: reciprocal(e.levels)),
    "rceil": ScaleRule("float", lambda e: reciprocal(e.largest)),
    "even": ScaleRule("float"),
    "floor": ScaleRule("float"),
    "nvfp4": ScaleRule("float", lambda e: reciprocal(e.largest), only=("e2m1", 16)),
}


@dataclass(frozen=True, slots=True)
class ReadRule:
    """Scales that no rule chooses: they are those of a file, which another program wrote. See "Read grids" in numerics.md.

    Attributes:
        kinds: of the elements that have such scales.
        scales: the type of a scale in the file: a `float` of 16 or 32 bits, the code of a power of two (`e8m0`, any code), or
            the bits of an `e4m3` under a float32 scale of the tensor.
        zeros: whether each group has a zero point.
        biases: whether each group has a float that is added to code times scale.
        inverse: whether the scale of the tensor divides the scales of blocks, instead of being multiplied with them.
        only: as in `ScaleRule`.
    """

    kinds: tuple[Kind, ...]
    scales: Stored
    zeros: bool = False
    biases: bool = False
    inverse: bool = False
    only: tuple[str, int] | None = None


#: Every kind of scales that are read and never chosen, by the name that takes the place of a scale rule in a grid.
READ_RULES: Final = {
    "affine": ReadRule(("integer",), "float", biases=True),
    "stored": ReadRule(("integer", "float"), "float"),
    "stored-zeros": ReadRule(("integer",), "float", zeros=True),
    "stored-e8m0": ReadRule(("float",), "e8m0"),
    "stored-nvfp4": ReadRule(("float",), "e4m3", only=("e2m1", 16)),
    "stored-nvfp4-inverse": ReadRule(("float",), "e4m3", inverse=True, only=("e2m1", 16)),
}

#: The multipliers of `SCALE_RULES` as float32 numbers, by element and rule.
STEP: Final = {
    (e.name, name): rule.multiplier(e)
    for name, rule in SCALE_RULES.items()
    for e in ELEMENTS.values()
    if rule.multiplier and rule.kind == e.kind and (rule.only is None or rule.only[0] == e.name)
}

#: The peak of a whole tensor maps to 6 * 448 in NVFP4: the largest e2m1 under the largest e4m3 block scale.
NVFP4_STEP: Final = reciprocal(6.0 * 448.0)

#: Values of the sixteen e2m1 codes; the sign is the high bit.
E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

#: The boundaries at which an e2m1 magnitude rounds to the next, in units of the scale; True: the boundary itself rounds up
#: (ties to even).
E2M1_BOUNDARIES: Final = (
    (0.25, False),
    (0.75, True),
    (1.25, False),
    (1.75, True),
    (2.5, False),
    (3.5, True),
    (5.0, False),
)


def element(name: str) -> Element:
    """The element called `name`.

    Raises:
        GridError: there is none.
    """
    try:
        return ELEMENTS[name]
    except KeyError:
        raise GridError(f"unknown element {name!r}: choose one of {', '.join(ELEMENTS)}") from None
