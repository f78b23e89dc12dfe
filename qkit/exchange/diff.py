"""Two model directories, tensor by tensor: what is missing, which codes and scales differ. Equal means equal."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.snapshot import Snapshot, StoredWeight
from qkit.formats import dense
from qkit.formats.packed import join
from qkit.reference import packing
from qkit.reference.packing import Packed

BLOCK = 1 << 20  #: numbers that are compared together


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor of two directories.

    Attributes:
        name: of the tensor in a float model.
        compared: `codes`, where both are quantized alike; `values` of the two, where not; `missing` or `extra`, where only the
            first or only the second directory has it; `shape` or `type`, where that is why nothing was compared.
        numbers: how many codes or values there are.
        codes, scales: how many codes differ, and how many scales and zero points.
        values: how many values differ, as bits.
        detail: the two grids, shapes or types, where they differ.
    """

    name: str
    compared: str
    numbers: int
    codes: int = 0
    scales: int = 0
    values: int = 0
    detail: str = ""

    @property
    def equal(self) -> bool:
        """Whether the two are the same tensor."""
        return self.compared in ("codes", "values") and not (self.codes or self.scales or self.values)


def compare(first: Snapshot, second: Snapshot) -> Iterator[Difference]:
    """Every tensor of either, by name.

    A weight that is quantized alike in both is compared code by code and scale by scale; under two grids, or quantized in
    one alone, by the values it stands for.

    Raises:
        ArtifactError: a tensor of one of them is not sound.
    """
    left, right = _named(first), _named(second)
    for name in sorted({*left, *right}):
        if name not in left or name not in right:
            only = left.get(name, right.get(name))
            assert only is not None
            yield Difference(name, "missing" if name in left else "extra", prod(only.shape))
        else:
            yield _compare(name, left[name], right[name])


def _named(snapshot: Snapshot) -> dict[str, StoredWeight | NDArray[Any]]:
    return {**{join(path, "weight"): weight for path, weight in snapshot.weights.items()}, **snapshot.tensors}


def _compare(name: str, a: StoredWeight | NDArray[Any], b: StoredWeight | NDArray[Any]) -> Difference:
    numbers = prod(a.shape)
    if a.shape != b.shape:
        return Difference(name, "shape", numbers, detail=f"{list(a.shape)}, {list(b.shape)}")
    if str(a.dtype) != str(b.dtype):
        return Difference(name, "type", numbers, detail=f"{a.dtype}, {b.dtype}")
    one, other = (x.read() if isinstance(x, StoredWeight) else x for x in (a, b))
    if isinstance(one, Packed) and isinstance(other, Packed) and _kind(one) == _kind(other):
        codes = sum(_flipped(one.rows(*rows), other.rows(*rows)) for rows in _rows(a.shape))
        parts = {**one.parts(), **other.parts()}.keys() - {"words"}
        scales = sum(_unequal(one.parts()[part], other.parts()[part]) for part in parts)
        return Difference(name, "codes", numbers, codes=codes, scales=scales)
    values = sum(_unequal(_values(one, *rows), _values(other, *rows)) for rows in _rows(a.shape))
    kinds = [str(x.grid) if isinstance(x, Packed) else "float" for x in (one, other)]
    return Difference(name, "values", numbers, values=values, detail=", ".join(kinds) if kinds[0] != kinds[1] else "")


def _kind(packed: Packed) -> tuple[Any, ...]:
    """What has to be the same for codes to mean the same; the name of the scale rule need not."""
    grid = packed.grid
    return grid.element.name, grid.symmetric, grid.scale == "nvfp4", packed.scales.shape


def _rows(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    rows = shape[0] if shape else 1
    step = max(BLOCK * rows // max(prod(shape), 1), 1)
    return ((start, start + step) for start in range(0, rows, step))


def _flipped(a: Packed, b: Packed) -> int:
    if np.array_equal(a.words, b.words):
        return 0
    bits, inputs = a.grid.element.bits, a.shape[-1]
    return _unequal(packing.unpack(a.words, bits, inputs), packing.unpack(b.words, bits, inputs))


def _values(x: Packed | NDArray[Any], start: int, stop: int) -> NDArray[Any]:
    if isinstance(x, Packed):
        return dense.store(x.rows(start, stop))["weight"]
    return x[start:stop] if x.ndim else x


def _unequal(a: NDArray[Any], b: NDArray[Any]) -> int:
    """How many numbers of two arrays differ as bits, so that NaN equals itself, and 0 is not -0."""
    kind = f"u{a.dtype.itemsize}"
    return int(np.count_nonzero(np.ascontiguousarray(a).view(kind) != np.ascontiguousarray(b).view(kind)))
