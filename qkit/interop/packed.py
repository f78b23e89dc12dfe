"""A quantized weight as files hold it: a `QTensor` whose codes are canonical words. What every layout is a renaming of."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit import packing
from qkit.errors import ArtifactError
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A quantized weight [outputs, inputs], cheap to pass on: the words are usually a view into a mapped file.

    Attributes:
        words: uint32 [outputs, words(inputs, bits)], see `qkit.packing`.
        scales, grid, dtype, zeros, tensor_scale: as in `QTensor`.
        shape: of the weight.
    """

    words: NDArray[np.uint32]
    scales: NDArray[Any]
    grid: Grid
    dtype: DType
    shape: tuple[int, ...]
    zeros: NDArray[np.uint8] | None = None
    tensor_scale: NDArray[np.float32] | None = None

    def parts(self) -> Tensors:
        """The arrays by name, without the absent ones."""
        named = {"words": self.words, "scales": self.scales, "zeros": self.zeros, "tensor_scale": self.tensor_scale}
        return {name: array for name, array in named.items() if array is not None}

    def rows(self, start: int, stop: int) -> "Packed":
        """The same weight, rows `start` to `stop` of it."""
        shared = self.scales.shape[0] != self.shape[0]  # one scale for the whole tensor
        return replace(
            self,
            words=self.words[start:stop],
            scales=self.scales if shared else self.scales[start:stop],
            zeros=self.zeros if shared or self.zeros is None else self.zeros[start:stop],
            shape=(len(self.words[start:stop]), *self.shape[1:]),
        )

    def blocks(self, numbers: int) -> Iterator["Packed"]:
        """The same weight in blocks of whole rows, of about so many numbers."""
        step = max(numbers // self.shape[-1], 1)
        return (self.rows(start, start + step) for start in range(0, self.shape[0], step))

    def permuted(self, order: NDArray[np.int64]) -> "Packed":
        """The same weight with its rows in another order."""
        shared = self.scales.shape[0] != self.shape[0]
        return replace(
            self,
            words=self.words[order],
            scales=self.scales if shared else self.scales[order],
            zeros=self.zeros if shared or self.zeros is None else self.zeros[order],
        )


def pack(q: QTensor[NDArray[Any]]) -> Packed:
    """`q` with its codes packed."""
    return Packed(packing.packed_codes(q), q.scales, q.grid, q.dtype, q.shape, q.zeros, q.tensor_scale)


def unpack(packed: Packed) -> QTensor[NDArray[Any]]:
    """The inverse of `pack`."""
    grid = packed.grid
    codes = packing.unpacked_codes(packed.words, element=grid.element, n=packed.shape[-1], symmetric=grid.symmetric)
    return QTensor(codes, packed.scales, grid, packed.dtype, zeros=packed.zeros, tensor_scale=packed.tensor_scale)


def as_words(data: NDArray[Any], *, width: int) -> NDArray[np.uint32]:
    """The bytes of each row of `data` as `width` words: a view where they fill them, else a copy with zeros at the end."""
    flat = np.ascontiguousarray(data).view(np.uint8)
    if flat.shape[-1] != width * 4:
        padded = np.zeros((*flat.shape[:-1], width * 4), np.uint8)
        padded[..., : flat.shape[-1]] = flat
        flat = padded
    return flat.view(np.uint32)


def as_bytes(words: NDArray[np.uint32], *, width: int) -> NDArray[np.uint8]:
    """The first `width` bytes of each row of words: the inverse of `as_words`."""
    return np.ascontiguousarray(words).view(np.uint8)[..., :width]


def want(tensors: Tensors, expected: dict[str, tuple[str, tuple[int, ...]]], layout: str, grid: Grid) -> None:
    """Compares names, types and shapes with what a layout says.

    Raises:
        ArtifactError: one is missing or otherwise.
    """
    for name, (kind, shape) in expected.items():
        if name not in tensors:
            raise ArtifactError(f"{name} is missing, which {layout} needs")
        if (tensors[name].dtype.name, tensors[name].shape) != (kind, shape):
            found = f"{tensors[name].dtype.name} {list(tensors[name].shape)}"
            raise ArtifactError(f"{name} is {found}, where {layout} of {grid} has {kind} {list(shape)}")


def mantissa(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    """The 23 low bits of fp32 patterns."""
    return np.asarray(x, np.float32).view(np.uint32) & np.uint32(0x7FFFFF)


def check(sound: NDArray[np.bool_], name: str, what: str) -> None:
    """Raises:
    ArtifactError: not all of a tensor's numbers are sound; the message counts the others.
    """
    if not sound.all():
        raise ArtifactError(f"{name} holds {np.count_nonzero(~sound)} numbers, each of which should be {what}")


def check_scales(scales: NDArray[np.float32], name: str) -> None:
    """Scales of integers: finite, not zero, with 8 significant bits (R3).

    Raises:
        ArtifactError: some are not.
    """
    check(np.isfinite(scales) & (scales != 0) & (mantissa(scales) & 0xFFFF == 0), name, "a finite bfloat16")
