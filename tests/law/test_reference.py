"""The law itself: golden vectors worked out by hand from numerics.md, exact fractions, and properties."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tables import INTEGERS

from qkit import reference
from qkit.element import MIN_SCALE
from qkit.errors import DTypeError, GridError, RangeError
from qkit.grid import Grid
from qkit.qtensor import DTYPES, DType
from qkit.reference import rounding
from qkit.testing import all_grids, random

SYMMETRIC = [Grid(name, 8, rule) for name in INTEGERS for rule in ("signed", "absmax", "midmax")]
ORDINARY = st.floats(-(2.0**66), 2.0**66, width=32).filter(lambda x: x == 0 or abs(x) > 2.0**-50)
GROUPS = arrays.arrays(np.float32, (3, 8), elements=ORDINARY)


@pytest.mark.parametrize(
    ("grid", "w", "scale", "codes", "values"),
    [
        # vmax = -8, s = -8 * -1/8 = 1; 3.5 and 0.5 are ties, to even
        (Grid("int4", 4, "signed"), [-8, 7, 3.5, 0.5], 1, [-8, 7, 4, 0], [-8, 7, 4, 0]),
        # vmax = 8 gives a negative scale; -7 / -1 = 7
        (Grid("int4", 4, "signed"), [8, -7, 2.5, 1], -1, [-8, 7, -2, -1], [8, -7, 2, 1]),
        # equal ends take the positive one; the other clips to the last code
        (Grid("int4", 4, "signed"), [-8, 8, 0, 1], -1, [7, -8, 0, -1], [-7, 8, 0, 1]),
        (Grid("int2", 4, "signed"), [-2, 1, 0.5, -1.5], 1, [-2, 1, 0, -2], [-2, 1, 0, -2]),
        (Grid("int4", 4, "absmax"), [7, -7, 0.5, 1.5], 1, [7, -7, 0, 2], [7, -7, 0, 2]),
        # 10/7 = 1.42857 lies between 182/128 and 183/128, nearer to 183/128 = 1.4296875
        (Grid("int4", 4, "absmax"), [10, -1, 0, 0], 1.4296875, [7, -1, 0, 0], [10.0078125, -1.4296875, 0, 0]),
        # the maximum sits on a tie: 7.5 goes to 8 and clips, -7.5 goes to -8
        (Grid("int4", 4, "midmax"), [7.5, -7.5, 1, -2.5], 1, [7, -8, 1, -2], [7, -8, 1, -2]),
        (Grid("int8", 4, "absmax"), [127, -127, 0.5, -1.5], 1, [127, -127, 0, -2], [127, -127, 0, -2]),
    ],
)
def test_golden_symmetric_integers(
    grid: Grid, w: list[float], scale: float, codes: list[int], values: list[float]
) -> None:
    q = reference.quantize(np.array([w], np.float32), grid)
    assert q.scales.tolist() == [[scale]]
    assert q.codes.tolist() == [codes]
    assert q.codes.dtype == np.int8
    assert reference.dequantize(q).tolist() == [values]


@pytest.mark.parametrize(
    ("w", "scale", "zero", "codes", "values"),
    [
        ([-5, 10, 0, 0.5], 1, 5, [0, 15, 5, 5], [-5, 10, 0, 0]),  # (10 + 5) / 15 = 1
        ([15, 3, 6.5, 7.5], 1, 0, [15, 3, 6, 8], [15, 3, 6, 8]),  # zero is always in the range
        ([-15, -3, -6.5, -7.5], 1, 15, [0, 12, 9, 7], [-15, -3, -6, -8]),
        ([0, 0, 0, 0], MIN_SCALE, 0, [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_golden_asymmetric_integers(
    w: list[float], scale: float, zero: int, codes: list[int], values: list[float]
) -> None:
    q = reference.quantize(np.array([w], np.float32), Grid("int4", 4, "minmax"))
    assert q.zeros is not None
    assert (q.scales.tolist(), q.zeros.tolist()) == ([[scale]], [[zero]])
    assert q.codes.tolist() == [codes]
    assert q.codes.dtype == q.zeros.dtype == np.uint8
    assert reference.dequantize(q).tolist() == [values]


@pytest.mark.parametrize(
    ("x", "rounded"),
    [
        (1 + 2**-8, 1.0),  # a tie: to even
        (1 + 3 * 2**-8, 1 + 2**-6),  # a tie: to even, upwards
        (1 + 2**-8 + 2**-23, 1 + 2**-7),
        (-(1 + 3 * 2**-8), -(1 + 2**-6)),
        (0.0, 0.0),
    ],
)
def test_golden_rounding_to_eight_bits(x: float, rounded: float) -> None:
    assert rounding.round_to_bfloat16(np.array([x], np.float32)).tolist() == [rounded]


def test_golden_e2m1() -> None:
    """amax = 6 under rceil: scale 1; every boundary, ties to even; what rounds to zero keeps its sign."""
    w = np.array([[6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -6, -0.25, -5, 5.5]], np.float32)
    q = reference.quantize(w, Grid("e2m1", "row"))
    assert q.scales.tolist() == [[127]]
    assert q.codes.tolist() == [[7, 0, 2, 2, 4, 4, 6, 6, 15, 8, 14, 7]]
    values = reference.dequantize(q)
    assert values.tolist() == [[6, 0, 1, 1, 2, 2, 4, 4, -6, 0, -4, 6]]
    assert np.signbit(values[0, 9])


@pytest.mark.parametrize(
    ("peak", "floor", "even", "rceil"),
    [
        (4.0, 127, 127, 127),
        (6.0, 127, 127, 127),
        (6.9, 127, 127, 128),  # 1.725 * 4: does not round up to 8, but is over 6
        (7.0, 127, 128, 128),  # 1.75 * 4: rounds up to 8
        (7.9, 127, 128, 128),
        (8.0, 128, 128, 128),
        (2.0**-126, 32, 32, 32),  # codes are clipped below
    ],
)
def test_golden_scales_of_mxfp4(peak: float, floor: int, even: int, rceil: int) -> None:
    w = np.full((1, 32), peak, np.float32)
    found = [reference.quantize(w, Grid("e2m1", 32, rule)).scales.item() for rule in ("floor", "even", "rceil")]
    assert found == [floor, even, rceil]


def test_golden_e4m3() -> None:
    """448 is the largest: scale 1. 17 is a tie of 16 and 18; 2^-9 is the smallest; 2^-10 a tie to zero."""
    w = np.array([[448, 1, 17, 2**-9, 2**-10, -448, 19]], np.float32)
    q = reference.quantize(w, Grid("e4m3", "row"))
    assert q.scales.tolist() == [[127]]
    assert q.codes.tolist() == [[0x7E, 0x38, 0x58, 0x01, 0x00, 0xFE, 0x5A]]
    assert reference.dequantize(q).tolist() == [[448, 1, 16, 2**-9, 0, -448, 20]]


def test_golden_nvfp4() -> None:
    """2000 / 2688 rounds up to 2^0. 2000 / 6 = 333.3 is between 320 and 352; blocks of zeros get 2^-9."""
    w = np.zeros((1, 48), np.float32)
    w[0, [0, 1]] = 2000, -160
    w[0, 16:20] = 6, 0.25, 0.75, -5
    q = reference.quantize(w, Grid("e2m1", 16, "nvfp4"))
    assert q.tensor_scale is not None
    assert q.tensor_scale.shape == ()
    assert q.tensor_scale == 1
    assert rounding.e4m3_values(q.scales).tolist() == [[320, 1, 2**-9]]
    assert q.codes[0, [0, 1]].tolist() == [7, 9]
    assert q.codes[0, 16:20].tolist() == [7, 0, 2, 14]
    assert reference.dequantize(q)[0, [0, 1, 16, 17, 18, 19]].tolist() == [1920, -160, 6, 0, 1, -4]


@pytest.mark.parametrize("grid", SYMMETRIC, ids=str)
@settings(deadline=None)  # the machine may be busy
@given(w=GROUPS)
def test_codes_are_the_exact_quotient_rounded_to_even(grid: Grid, w: np.ndarray) -> None:
    q = reference.quantize(w, grid)
    for row, scale, codes in zip(w.tolist(), q.scales[:, 0].tolist(), q.codes.tolist(), strict=True):
        for x, code in zip(row, codes, strict=True):
            exact = round(Fraction(x) / Fraction(scale))  # Python rounds fractions to even
            assert code == min(max(exact, grid.element.lowest), grid.element.highest)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@settings(deadline=None)  # the machine may be busy
@given(w=GROUPS)
def test_asymmetric_codes_are_exact_too(bits: int, w: np.ndarray) -> None:
    grid = Grid(f"int{bits}", 8, "minmax")
    q = reference.quantize(w, grid)
    assert q.zeros is not None
    for i, row in enumerate(w.tolist()):
        s, z = Fraction(q.scales[i, 0].item()), int(q.zeros[i, 0])
        assert z == min(max(round(-Fraction(min(0.0, *row)) / s), 0), grid.element.levels)
        exact = [min(max(round(Fraction(x) / s) + z, 0), grid.element.levels) for x in row]
        assert q.codes[i].tolist() == exact


@pytest.mark.parametrize("grid", SYMMETRIC, ids=str)
@settings(deadline=None)  # the machine may be busy
@given(w=GROUPS)
def test_values_are_exactly_code_times_scale(grid: Grid, w: np.ndarray) -> None:
    q = reference.quantize(w, grid)
    for value, code, scale in zip(
        reference.dequantize(q).ravel().tolist(),
        q.codes.ravel().tolist(),
        np.repeat(q.scales, 8).tolist(),
        strict=True,
    ):
        assert Fraction(value) == code * Fraction(scale)


@pytest.mark.parametrize("rule", ["signed", "absmax"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@settings(deadline=None)  # the machine may be busy
@given(w=GROUPS)
def test_signed_and_absmax_are_idempotent(bits: int, rule: str, w: np.ndarray) -> None:
    grid = Grid(f"int{bits}", 8, rule)
    once = reference.fake_quantize(w, grid)
    assert np.array_equal(reference.fake_quantize(once, grid), once)


def test_midmax_is_not_idempotent() -> None:
    once = reference.fake_quantize(np.array([[7.5, -7.5, 1, -2.5]], np.float32), Grid("int4", 4, "midmax"))
    assert once.tolist() == [[7, -8, 1, -2]]
    assert not np.array_equal(reference.fake_quantize(once, Grid("int4", 4, "midmax")), once)


@pytest.mark.parametrize("grid", all_grids(), ids=str)
def test_scales_of_integers_have_eight_bits(grid: Grid) -> None:
    scales = reference.quantize(random((4, 128), 3), grid).scales
    if grid.element.kind == "integer":
        assert (scales.view(np.uint32) & 0xFFFF == 0).all()
        assert (np.abs(scales) >= MIN_SCALE).all()


@pytest.mark.parametrize("grid", all_grids(), ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_all_zero_tensor_stays_zero(grid: Grid, dtype: DType) -> None:
    w = np.zeros((2, 128), rounding.DTYPE[dtype])
    q = reference.quantize(w, grid)
    values = reference.dequantize(q)
    assert values.dtype == w.dtype
    assert (values == 0).all()
    assert (reference.fake_quantize(w, grid) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_zeros_gets_the_smallest_scale(dtype: DType) -> None:
    q = reference.quantize(np.zeros((1, 64), rounding.DTYPE[dtype]), Grid("int4", 64))
    assert q.scales.tolist() == [[MIN_SCALE]]
    assert not q.codes.any()


def test_the_smallest_scale_keeps_the_sign() -> None:
    w = np.zeros((2, 8), np.float32)
    w[:, 0] = 2.0**-140, -(2.0**-140)
    assert reference.quantize(w, Grid("int4", 8)).scales.tolist() == [[-MIN_SCALE], [MIN_SCALE]]


@pytest.mark.parametrize("grid", [Grid("int4", 64), Grid("int8", "row"), Grid("e2m1", 32), Grid("e4m3", "tensor")])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**127, 3e38])
def test_what_has_no_codes_is_refused(grid: Grid, bad: float) -> None:
    import qkit

    w = random((2, 128), 5)
    w[1, 7] = bad
    with pytest.raises(RangeError, match="the array holds"):
        qkit.quantize(w, grid)


@pytest.mark.parametrize("dtype", ["int8", "int32", "float64", "bool"])
def test_an_array_of_another_type_is_refused(dtype: str) -> None:
    import qkit

    w = np.ones((2, 64), dtype)
    for verb in (qkit.quantize, qkit.fake_quantize):
        with pytest.raises(DTypeError, match=f"cannot quantize an array of {dtype}"):
            verb(w, Grid("int4", 64))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_an_empty_array_is_refused(shape: tuple[int, ...]) -> None:
    import qkit

    for verb in (qkit.quantize, qkit.fake_quantize):
        with pytest.raises(GridError, match="no last axis, or no elements"):
            verb(np.ones(shape, np.float32), Grid("int4", 64))
