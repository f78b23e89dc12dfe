"""Comparison of two model directories, tensor by tensor: missing tensors, and different codes, scales or values."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.snapshot import Snapshot, StoredWeight
from qkit.exchange.distance import Distance, measure
from qkit.formats import dense
from qkit.formats.packed import join
from qkit.qtensor import DTYPES
from qkit.reference import packing
from qkit.reference.packing import Packed

BLOCK = 1 << 20  #: numbers that one step compares


@dataclass(frozen=True, slots=True)
class Difference:
    """The comparison of one tensor in two directories.

    Attributes:
        name: name of the tensor in a float model.
        compared: `codes` for two weights on equal grids, `values` for other pairs. `missing` where only the first directory has
            the tensor, `extra` where only the second has it. `shape` or `type` where these differ and nothing was compared.
        numbers: number of codes or values.
        codes: number of different codes.
        scales: number of different scales and zero points.
        values: number of values with different bits.
        detail: the two grids, shapes or types, where they differ.
        error: the distance of the second directory's values from the first's, where two weights of one shape are not equal.
    """

    name: str
    compared: str
    numbers: int
    codes: int = 0
    scales: int = 0
    values: int = 0
    detail: str = ""
    error: Distance | None = None

    @property
    def equal(self) -> bool:
        """Whether the two tensors are equal."""
        return self.compared in ("codes", "values") and not (self.codes or self.scales or self.values)


def compare(first: Snapshot, second: Snapshot) -> Iterator[Difference]:
    """The comparison of every tensor of either snapshot, by name.

    Two weights on equal grids are compared code by code and scale by scale. Two grids, or a quantized and a float weight, are
    compared by their dequantized values.

    Raises:
        ArtifactError: a tensor of a snapshot is not sound.
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
    found = _differing(name, a, b)
    if found.equal or a.shape != b.shape or len(a.shape) < 2:
        return found
    one, other = (x.read() if isinstance(x, StoredWeight) else x for x in (a, b))
    if not all(
        isinstance(x, Packed) or np.issubdtype(x.dtype, np.floating) or x.dtype.name in DTYPES for x in (one, other)
    ):
        return found
    return replace(found, error=measure((_values(one, *rows), _values(other, *rows)) for rows in _rows(a.shape)))


def _differing(name: str, a: StoredWeight | NDArray[Any], b: StoredWeight | NDArray[Any]) -> Difference:
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
    """Properties that give codes their meaning. The name of the scale rule is not one of them."""
    grid = packed.grid
    kind = (grid.scale, packed.scales.dtype.name) if grid.read else (grid.symmetric, grid.has_tensor_scale)
    return grid.element.name, kind, packed.scales.shape


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
    """Number of elements with different bits, so that NaN equals itself, and 0 differs from -0."""
    kind = f"u{a.dtype.itemsize}"
    return int(np.count_nonzero(np.ascontiguousarray(a).view(kind) != np.ascontiguousarray(b).view(kind)))
