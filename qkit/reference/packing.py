"""Canonical bytes: codes of 2 to 8 bits as one little-endian bit stream per row, lowest bit first.

For every width the stream is, byte for byte, that of MLX's uint32 words and of the int32 words that compressed-tensors calls
`pack-quantized`; at 4 bits it is also the low-nibble-first order of mxfp4 and nvfp4.

`Packed` is a quantized weight as files hold it: a `QTensor` whose codes are such words. Layouts rename its arrays.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.element import Element
from qkit.grid import Grid
from qkit.qtensor import DType, QTensor

WORD_BITS = 32


def words(n: int, bits: int) -> int:
    """How many 32-bit words hold `n` codes of `bits` bits.

    >>> words(64, 3)
    6
    """
    return -(-n * bits // WORD_BITS)


def unsigned(codes: NDArray[Any], element: Element) -> NDArray[np.uint8]:
    """Signed integer codes -2^(bits-1) .. 2^(bits-1)-1 shifted to 0 .. 2^bits-1; unsigned codes do not change."""
    if codes.dtype != np.int8:
        return codes
    return codes.view(np.uint8) + np.uint8(-element.lowest)


def signed(codes: NDArray[np.uint8], element: Element) -> NDArray[np.int8]:
    """The inverse of `unsigned`: 0 .. 2^bits-1 shifted to -2^(bits-1) .. 2^(bits-1)-1."""
    return codes.view(np.int8) + np.int8(element.lowest)  # eight bits wrap around to the same number


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """uint8 codes [..., n], each below 2^bits -> little-endian uint32 words [..., words(n, bits)]; the tail is zeros."""
    n = codes.shape[-1]
    if 8 % bits == 0:
        return _fold(codes, bits)
    eights = np.zeros((*codes.shape[:-1], -(-n // 8), 8), np.uint8)
    eights.reshape(*codes.shape[:-1], -1)[..., :n] = codes
    stream = np.zeros(eights.shape[:-1], np.uint64)  # eight codes fill exactly `bits` bytes
    for i in range(8):
        stream |= eights[..., i].astype(np.uint64) << np.uint64(bits * i)
    low = stream.astype("<u8")[..., None].view(np.uint8)[..., :bits]
    out = np.zeros((*codes.shape[:-1], words(n, bits) * 4), np.uint8)
    flat = low.reshape(*codes.shape[:-1], -1)[..., : out.shape[-1]]
    out[..., : flat.shape[-1]] = flat
    return out.view("<u4")


def _fold(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """`pack` for widths that divide a byte: neighbours are joined until bytes are full."""
    n = codes.shape[-1]
    spare = words(n, bits) * (WORD_BITS // bits) - n
    if spare:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], spare), np.uint8)], axis=-1)
    codes = np.ascontiguousarray(codes)
    while bits < 8:
        pairs = codes.view("<u2")
        joined = pairs >> (8 - bits)
        joined |= pairs
        codes = joined.astype(np.uint8)
        bits *= 2
    return codes.view("<u4")


def _unfold(data: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `_fold`: bytes are halved until each holds one code."""
    half = 8
    while half > bits:
        half //= 2
        pairs = data.astype("<u2")
        pairs |= pairs << (8 - half)
        pairs &= ((1 << half) - 1) * 0x0101
        data = pairs.view(np.uint8)
    return data


def unpack(packed: NDArray[Any], bits: int, n: int) -> NDArray[np.uint8]:
    """32-bit words [..., words(n, bits)] -> uint8 codes [..., n]."""
    data = np.ascontiguousarray(packed).view(np.uint8)
    if 8 % bits == 0:
        return _unfold(data, bits)[..., :n]
    eighths = np.zeros((*data.shape[:-1], -(-n // 8), 8), np.uint8)
    flat = np.zeros((*data.shape[:-1], eighths.shape[-2] * bits), np.uint8)
    length = min(flat.shape[-1], data.shape[-1])
    flat[..., :length] = data[..., :length]
    eighths[..., :bits] = flat.reshape(*data.shape[:-1], -1, bits)
    stream = eighths.view("<u8")
    wide = (stream >> (np.arange(8, dtype=np.uint64) * np.uint64(bits))) & np.uint64((1 << bits) - 1)
    codes: NDArray[np.uint8] = wide.astype(np.uint8).reshape(*data.shape[:-1], -1)[..., :n]
    return codes


def packed_codes(q: QTensor[NDArray[Any]]) -> NDArray[np.uint32]:
    """The codes of `q` [..., n] as canonical words [..., words(n, bits)]."""
    return pack(unsigned(q.codes, q.grid.element), q.grid.element.bits)


def unpacked_codes(packed: NDArray[Any], *, element: Element, n: int, symmetric: bool) -> NDArray[Any]:
    """The inverse of `packed_codes`: int8 for symmetric integers, else uint8."""
    codes = unpack(packed, element.bits, n)
    return signed(codes, element) if element.kind == "integer" and symmetric else codes


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A quantized weight [outputs, inputs], whose words are usually a view into a mapped file.

    Attributes:
        words: uint32 [outputs, words(inputs, bits)], the stream of bits of each row.
        scales, grid, dtype, zeros, tensor_scale, biases: as in `QTensor`.
        shape: of the weight.
    """

    words: NDArray[np.uint32]
    scales: NDArray[Any]
    grid: Grid
    dtype: DType
    shape: tuple[int, ...]
    zeros: NDArray[np.uint8] | None = None
    tensor_scale: NDArray[np.float32] | None = None
    biases: NDArray[Any] | None = None

    def parts(self) -> dict[str, NDArray[Any]]:
        """The arrays by name, without the absent ones."""
        named = {
            "words": self.words,
            "scales": self.scales,
            "zeros": self.zeros,
            "tensor_scale": self.tensor_scale,
            "biases": self.biases,
        }
        return {name: array for name, array in named.items() if array is not None}

    def rows(self, start: int, stop: int) -> "Packed":
        """The same weight, rows `start` to `stop` of it."""
        return self._of_rows(slice(start, stop))

    def blocks(self, numbers: int) -> Iterator["Packed"]:
        """The same weight in blocks of whole rows, of about so many numbers."""
        step = max(numbers // self.shape[-1], 1)
        return (self.rows(start, start + step) for start in range(0, self.shape[0], step))

    def permuted(self, order: NDArray[np.int64]) -> "Packed":
        """The same weight with its rows in another order."""
        return self._of_rows(order)

    def _of_rows(self, rows: Any) -> "Packed":
        shared = self.scales.shape[0] != self.shape[0]  # one scale for the whole tensor
        words = self.words[rows]
        per_group = {"scales": self.scales, "zeros": self.zeros, "biases": self.biases}
        mine: dict[str, Any] = {
            name: array if shared or array is None else array[rows] for name, array in per_group.items()
        }
        return replace(self, words=words, shape=(len(words), *self.shape[1:]), **mine)
