"""How one number is stored. The only module with numeric constants; every backend takes them from here."""

import struct
from dataclasses import dataclass
from typing import Final, Literal

from qkit.errors import GridError

MIN_SCALE: Final = 2.0**-96  #: the smallest magnitude of an integer scale; a group of zeros gets it
MIN_SCALE_CODE: Final = (
    32  #: E8M0 codes are clipped to 32..253, so that 0 and 255, traps in three libraries, never appear
)
MAX_SCALE_CODE: Final = 253
MIN_BLOCK_SCALE: Final = 2.0**-9  #: the smallest NVFP4 block scale: the smallest positive e4m3
AVERAGE: Final = 0.01  #: how much of each training step goes into a running average of activation ranges
LIMIT: Final = 2.0**127  #: magnitudes from here on are refused: their rounded value may be infinite


def reciprocal(x: float) -> float:
    """1/x as the nearest float32, held in a Python float. Scales are products with it, never divisions.

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
        bits: its width.
        largest: the largest representable value; for a float 6, 448 or 57344.
        mantissa: explicit mantissa bits of a float, 0 for an integer.
        min_exponent: exponent of a float's smallest normal number, 0 for an integer.
    """

    name: str
    kind: Literal["integer", "float"]
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


ELEMENTS: Final = {
    element.name: element
    for element in (
        *map(_integer, (2, 3, 4, 5, 6, 8)),
        Element("e2m1", "float", 4, 6.0, mantissa=1, min_exponent=0),
        Element("e4m3", "float", 8, 448.0, mantissa=3, min_exponent=-6),
        Element("e5m2", "float", 8, 57344.0, mantissa=2, min_exponent=-14),
    )
}

#: By element and scale rule: what a group's peak (its span, under `minmax`) is multiplied with to give its scale.
STEP: Final = {
    **{(name, "signed"): 1 / e.lowest for name, e in ELEMENTS.items() if e.kind == "integer"},
    **{(name, "absmax"): reciprocal(e.highest) for name, e in ELEMENTS.items() if e.kind == "integer"},
    **{(name, "midmax"): reciprocal(e.highest + 0.5) for name, e in ELEMENTS.items() if e.kind == "integer"},
    **{(name, "minmax"): reciprocal(e.levels) for name, e in ELEMENTS.items() if e.kind == "integer"},
    **{(name, "rceil"): reciprocal(e.largest) for name, e in ELEMENTS.items() if e.kind == "float"},
    ("e2m1", "nvfp4"): reciprocal(6.0),
}

#: The peak of a whole tensor maps to 6 * 448 in NVFP4: the largest e2m1 under the largest e4m3 block scale.
NVFP4_STEP: Final = reciprocal(6.0 * 448.0)

#: Values of the sixteen e2m1 codes; the sign is the high bit.
E2M1_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

#: Where one e2m1 magnitude rounds to the next, in units of the scale, and whether the boundary itself goes up (ties to even).
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
