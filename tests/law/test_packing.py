"""Canonical bytes: literal streams, and every code comes back."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qkit import reference
from qkit.element import ELEMENTS, element
from qkit.grid import Grid
from qkit.reference import packing
from qkit.testing import all_grids, random

WIDTHS = sorted({element.bits for element in ELEMENTS.values()})


def test_four_bits_are_low_nibble_first() -> None:
    packed = packing.pack(np.array([1, 2, 3, 4, 5, 6, 7, 8], np.uint8), 4)
    assert packed.tolist() == [0x87654321]
    assert packed.view(np.uint8).tolist() == [0x21, 0x43, 0x65, 0x87]


def test_three_bits_run_across_bytes() -> None:
    """Lowest bit first: code i begins at bit 3 * i of the stream."""
    packed = packing.pack(np.array([1, 2, 3, 4, 5, 6, 7, 0], np.uint8), 3)
    assert packed.tolist() == [1 | 2 << 3 | 3 << 6 | 4 << 9 | 5 << 12 | 6 << 15 | 7 << 18]


def test_five_bits_run_across_words() -> None:
    packed = packing.pack(np.array([0, 0, 0, 0, 0, 0, 0b10110], np.uint8), 5)
    assert packed.tolist() == [(0b10110 << 30) & 0xFFFFFFFF, 0b10110 >> 2]


def test_codes_are_shifted_to_be_unsigned() -> None:
    q = reference.quantize(np.array([[-4.0, 3.0, 0.0, 0.0]], np.float32), Grid("int3", 4))
    assert q.codes.tolist() == [[-4, 3, 0, 0]]
    assert packing.packed_codes(q).tolist() == [[0 | 7 << 3 | 4 << 6 | 4 << 9]]


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_enough_and_no_more(bits: int) -> None:
    for n in range(1, 200):
        assert packing.words(n, bits) * 32 >= n * bits > (packing.words(n, bits) - 1) * 32


@pytest.mark.parametrize("bits", WIDTHS)
@settings(deadline=None)  # the machine may be busy
@given(data=st.data())
def test_unpack_gives_back_what_was_packed(bits: int, data: st.DataObject) -> None:
    shapes = arrays.array_shapes(min_dims=1, max_dims=3, max_side=70)
    codes = data.draw(arrays.arrays(np.uint8, shapes, elements=st.integers(0, 2**bits - 1)))
    packed = packing.pack(codes, bits)
    assert packed.shape == (*codes.shape[:-1], packing.words(codes.shape[-1], bits))
    assert np.array_equal(packing.unpack(packed, bits, codes.shape[-1]), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@settings(deadline=None)  # the machine may be busy
@given(data=st.data())
def test_the_stream_is_the_sum_of_shifted_codes(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=80))
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    packed = packing.pack(np.array(codes, np.uint8), bits)
    assert int.from_bytes(packed.tobytes(), "little") == stream


@pytest.mark.parametrize("grid", all_grids(), ids=str)
def test_the_codes_of_every_grid_come_back(grid: Grid) -> None:
    q = reference.quantize(random((4, 128), 1), grid)
    back = packing.unpacked_codes(packing.packed_codes(q), element=grid.element, n=128, symmetric=grid.symmetric)
    assert back.dtype == q.codes.dtype
    assert np.array_equal(back, q.codes)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_the_layout_in_memory_does_not_matter(layout: str) -> None:
    codes = np.arange(64, dtype=np.uint8).reshape(8, 8) % 16
    other: Any = codes.T.copy().T if layout == "transposed" else np.repeat(codes, 2, axis=1)[:, ::2]
    assert np.array_equal(packing.pack(other, 4), packing.pack(codes, 4))
    assert np.array_equal(packing.unpack(packing.pack(codes, 4).T.copy().T, 4, 8), codes)


def test_signed_and_unsigned_are_inverse() -> None:
    for name in ("int2", "int5", "int8"):
        kind = element(name)
        codes = np.arange(kind.lowest, kind.highest + 1).astype(np.int8)
        assert np.array_equal(packing.unsigned(codes, kind), np.arange(kind.levels + 1))
        assert np.array_equal(packing.signed(packing.unsigned(codes, kind), kind), codes)
