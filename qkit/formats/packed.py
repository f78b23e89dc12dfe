"""Quantized weights to packed words and back, and the names and checks that all layouts share."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit import native
from qkit.errors import ArtifactError
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.reference import packing
from qkit.reference.packing import Packed

Tensors = dict[str, NDArray[Any]]


def join(path: str, name: str) -> str:
    """Full name of the tensor `name` of the layer at `path`, which is empty where the whole model is one layer."""
    return f"{path}.{name}" if path else name


def pack(q: QTensor[NDArray[Any]]) -> Packed:
    """`q` with its codes packed."""
    words = native.pack(q.codes, q.grid.element) if native.available() else packing.packed_codes(q)
    return Packed(words, q.scales, q.grid, q.dtype, q.shape, q.zeros, q.tensor_scale, q.biases)


def unpack(packed: Packed) -> QTensor[NDArray[Any]]:
    """The inverse of `pack`."""
    grid = packed.grid
    codes = packing.unpacked_codes(packed.words, element=grid.element, n=packed.shape[-1], symmetric=grid.symmetric)
    more = {name: getattr(packed, name) for name in ("zeros", "tensor_scale", "biases")}
    return QTensor(codes, packed.scales, grid, packed.dtype, **more)


def as_words(data: NDArray[Any], *, width: int) -> NDArray[np.uint32]:
    """The bytes of each row of `data` as `width` packed words: a view where the bytes fill them, else a copy with zeros added."""
    flat = np.ascontiguousarray(data).view(np.uint8)
    if flat.shape[-1] != width * 4:
        padded = np.zeros((*flat.shape[:-1], width * 4), np.uint8)
        padded[..., : flat.shape[-1]] = flat
        flat = padded
    return flat.view(np.uint32)


def as_bytes(words: NDArray[np.uint32], *, width: int) -> NDArray[np.uint8]:
    """The first `width` bytes of each row of packed words: the inverse of `as_words`."""
    return np.ascontiguousarray(words).view(np.uint8)[..., :width]


def check_parts(tensors: Tensors, expected: dict[str, tuple[str, tuple[int, ...]]], layout: str, grid: Grid) -> None:
    """Compares names, types and shapes of stored tensors with those that a layout expects.

    Raises:
        ArtifactError: a tensor is missing, has another type or shape, or has no place in the layout, whose readers may use it.
    """
    for name in tensors.keys() - expected.keys():
        raise ArtifactError(f"{name} is there too, and {layout} of {grid} has no such tensor")
    for name, (kind, shape) in expected.items():
        if name not in tensors:
            raise ArtifactError(f"{name} is missing, which {layout} needs")
        if (tensors[name].dtype.name, tensors[name].shape) != (kind, shape):
            found = f"{tensors[name].dtype.name} {list(tensors[name].shape)}"
            raise ArtifactError(f"{name} is {found}, where {layout} of {grid} has {kind} {list(shape)}")


def mantissa(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    """The 23 low bits of fp32 patterns."""
    return np.asarray(x, np.float32).view(np.uint32) & np.uint32(0x7FFFFF)


def check(sound: NDArray[np.bool_], name: str, wanted: str) -> None:
    """Checks that all numbers of the tensor `name` are `sound`.

    Args:
        wanted: text for a sound number, for the message.

    Raises:
        ArtifactError: some are not; the message counts them.
    """
    if not sound.all():
        raise ArtifactError(f"{name} holds {np.count_nonzero(~sound)} numbers, each of which should be {wanted}")


def check_scales(scales: NDArray[np.float32], name: str) -> None:
    """Checks scales of integers: finite, not zero, with 8 significant bits (R3).

    Raises:
        ArtifactError: some scales are not.
    """
    magnitudes, patterns = np.abs(scales), np.ascontiguousarray(scales).view(np.uint32)
    low = np.bitwise_or.reduce(patterns, axis=None) & 0xFFFF
    if scales.size and magnitudes.min() > 0 and magnitudes.max() < np.inf and not low:
        return  # three passes instead of eight: a model has a scale for every 32 numbers
    check(np.isfinite(scales) & (scales != 0) & (mantissa(scales) & 0xFFFF == 0), name, "a finite bfloat16")
