"""The merged weight in NumPy: the law of adapters, which every engine follows bit for bit.

Matrix products differ in their last bits between engines, devices and shapes, and a last bit may flip a code. So factors are
shortened to 12 significant bits, so that every product of two is exact in float32, and sums have one order. Each engine then
computes the same merged weight, fused or not, compiled or not. Exact but for products below 2^-126, which no grid can see.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qkit.element import MIN_SCALE, Element
from qkit.errors import QkitError
from qkit.qtensor import QTensor
from qkit.reference import rounding

Kind = Literal["lora", "dora"]
KINDS: tuple[Kind, ...] = ("lora", "dora")
Floats = NDArray[np.float32]

DROPPED = 12  #: of float32's 24 significant bits
DITHER = 0xC13FA9A9, 0x91E10DA5  #: 2^32 by the powers of 1/1.3247...: Roberts' sequence, of even gaps in two dimensions


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """The adapter of one weight, as NumPy arrays: the merged weight is W + scale * B A, see `merged`.

    For a projection of experts every array has a first axis more, [experts, ...], and no expert sees another.

    Attributes:
        a: float32 [rank, inputs].
        b: float32 [outputs, rank].
        scale: the factor of the product.
        magnitude: `dora` only: float32 [outputs], the length of each row of the merged weight.
        dithered: whether the base is codes, whose values are spread within their cells before the product is added: `dithered`.
        gains: float32 [outputs, groups or 1, numbers], of a base of codes alone: they move its scales and biases, see
            `qkit.reference.gains`.

    Raises:
        QkitError: shapes do not fit each other, or a value is not finite.
    """

    a: Floats
    b: Floats
    scale: float
    magnitude: Floats | None = None
    dithered: bool = False
    gains: Floats | None = None

    def __post_init__(self) -> None:
        fits = self.a.ndim == self.b.ndim and self.a.ndim in (2, 3) and self.a.shape[-2] == self.b.shape[-1]
        if not fits or self.a.shape[:-2] != self.b.shape[:-2] or not self.a.shape[-2]:
            raise QkitError(
                f"an adapter's A is {self.a.shape} and its B {self.b.shape}: want [rank, inputs], [outputs, rank]"
            )
        if self.magnitude is not None and self.magnitude.shape != self.b.shape[:-1]:
            raise QkitError(
                f"an adapter's magnitude is {self.magnitude.shape} and its B {self.b.shape}: want [outputs]"
            )
        if self.gains is not None and (self.gains.ndim != 3 or self.gains.shape[0] != self.b.shape[0]):
            raise QkitError(
                f"an adapter's gains are {self.gains.shape} and its B {self.b.shape}: want [outputs, groups or 1, 1 or 2]"
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
        return int(self.a.shape[-2])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it updates: (outputs, inputs), or (experts, outputs, inputs)."""
        return (*self.b.shape[:-1], self.a.shape[-1])

    def parts(self) -> dict[str, Floats]:
        """The arrays by name, without the absent one."""
        named: dict[str, Any] = {"a": self.a, "b": self.b, "magnitude": self.magnitude, "gains": self.gains}
        return {name: array for name, array in named.items() if array is not None}


def merged(w: NDArray[Any], update: Update) -> Floats:
    """The weight [..., outputs, inputs] that a layer with base weight `w` and an adapter trains with, before its grid; float32.

    LoRA: W + scale * B A. DoRA: m * V / ||V|| by rows, with V = W + scale * B A.
    """
    v = w.astype(np.float32) + product(shorten(update.b * np.float32(update.scale)), shorten(update.a))
    if update.magnitude is None:
        return v
    return v * (update.magnitude / row_norms(v))[..., None]


def dithered(q: QTensor[NDArray[Any]]) -> Floats:
    """The values [outputs, inputs] of `q`, float32, each moved by `dither` times the distance to its neighbor on the grid.

    A value stays in its cell: it rounds to its code. So a small update moves a share of the codes as large as itself, in place of
    none. The largest of a group do not move, since the rules find scales by them; on a read grid all move.
    """
    codes = q.codes.reshape(q.grid.group_shape(q.shape))
    d = dither(q.shape).reshape(codes.shape)
    if q.grid.element.kind == "float":
        v, moved = _moved_floats(codes, d, q.grid.element)
    else:
        v = codes.astype(np.float32)
        v = v if q.zeros is None else v - rounding.each(q.zeros.astype(np.float32))
        moved = v + d
    if not q.grid.read:
        moved = np.where(_outermost(v, symmetric=q.grid.symmetric), v, moved)
    values = moved * rounding.each(rounding.scale_values(q))
    if q.biases is not None:
        values = values + rounding.each(q.biases.astype(np.float32))
    return values.reshape(q.shape)


def dither(shape: tuple[int, ...]) -> Floats:
    """Multiples of 2^-9 between -1/2 and 1/2, exclusive, for [outputs, inputs]: evenly spread, and the same for every weight."""
    rows, columns = (
        (np.arange(n, dtype=np.uint64) * np.uint64(step)).astype(np.uint32)
        for n, step in zip(shape, DITHER, strict=True)
    )
    levels = (rows[:, None] + columns) >> np.uint32(24)
    return (levels.astype(np.float32) * np.float32(2) - np.float32(255)) * np.float32(2.0**-9)


def _outermost(v: Floats, *, symmetric: bool) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.abs(v) == np.abs(v).max(axis=-1, keepdims=True)
    if not symmetric:
        found = (v == v.max(axis=-1, keepdims=True)) | (v == v.min(axis=-1, keepdims=True))
    return found


def _moved_floats(codes: NDArray[Any], d: Floats, element: Element) -> tuple[Floats, Floats]:
    """The values of codes of small floats, and the same moved towards the neighbor on the side of `d`."""
    table = magnitudes(element)
    code, last = codes & (1 << (element.bits - 1)) - 1, len(table) - 1
    sign = np.where(codes >> (element.bits - 1) & 1, np.float32(-1), np.float32(1))
    size, along = table[code], d * sign
    up, down = table[np.minimum(code + 1, last)] - size, size - table[np.maximum(code, 1) - 1]
    gap = np.where(((along > 0) & (code < last)) | (code == 0), up, down)
    return sign * size, sign * (size + along * gap)


def magnitudes(element: Element) -> Floats:
    """The values of the positive codes of a small float, in order, up to the largest."""
    values = rounding.float_values(np.arange(1 << (element.bits - 1), dtype=np.uint8), element)
    return values[values <= element.largest]


def product(b: Floats, a: Floats) -> Floats:
    """B A of shortened factors [..., outputs, rank] and [..., rank, inputs], summed from the first column of B to the last."""
    total = b[..., :1] * a[..., :1, :]
    for k in range(1, a.shape[-2]):
        total = total + b[..., k : k + 1] * a[..., k : k + 1, :]
    return total


def row_norms(v: Floats) -> Floats:
    """Lengths [..., outputs] of the rows of `v`, shortened; at least 2^-96. Squares are summed by halves: i and i + n/2."""
    squares = shorten(v) ** 2
    n = 1 << (v.shape[-1] - 1).bit_length()
    squares = np.pad(squares, ((0, 0),) * (v.ndim - 1) + ((0, n - v.shape[-1]),))
    while n > 1:
        n //= 2
        squares = squares[..., :n] + squares[..., n:]
    return np.maximum(np.sqrt(squares[..., 0]), np.float32(MIN_SCALE))


def shorten(x: Floats) -> Floats:
    """`x` with 12 significant bits, ties to even. In integers, which compilers do not rewrite."""
    u = np.ascontiguousarray(x).view(np.uint32)
    return ((u + np.uint32((1 << DROPPED - 1) - 1) + (u >> DROPPED & 1)) & np.uint32(-1 << DROPPED & 0xFFFFFFFF)).view(
        np.float32
    )
