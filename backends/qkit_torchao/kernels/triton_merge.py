"""The merged weight in one pass: a base, plus the product of two shortened factors; and its values on a grid. See `cuda_merge`.

A base is a weight, or packed codes, spread within their cells where that is wished. Products of factors are exact. Sums run from
the first column of B to the last, as in `arithmetic.merged`. Groups are powers of two.
"""

import triton
import triton.language as tl

from qkit.element import MIN_SCALE
from qkit.reference import gains as gain_law
from qkit.reference import merged as law
from qkit_torchao.kernels.triton_arithmetic import bits, extremes, floats, narrow, round_to_bfloat16, steps, units
from qkit_torchao.kernels.triton_unpack import codes_at, whole
from qkit_torchao.kernels.triton_words import scale

ROW, COLUMN = (tl.constexpr(step - (1 << 32)) for step in law.DITHER)
DROPPED, HALF = tl.constexpr(law.DROPPED), tl.constexpr((1 << law.DROPPED - 1) - 1)
KEPT = tl.constexpr(-(1 << law.DROPPED))
UNIT, LEAST = tl.constexpr(gain_law.UNIT), tl.constexpr(MIN_SCALE)
LOWER, UPPER = tl.constexpr(gain_law.LIMITS[0]), tl.constexpr(gain_law.LIMITS[1])
LARGEST = tl.constexpr(gain_law.LARGEST["bfloat16"])


@triton.constexpr_function
def type_named(name):
    """The type of this name."""
    return {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}[name]


@triton.jit
def shorten(x):
    """`x` with 12 significant bits, ties to even."""
    u = bits(x)
    return floats((u + HALF + ((u >> DROPPED) & 1)) & KEPT)


@triton.jit
def left(b, n, r, outputs, factor, RANK: tl.constexpr):
    """Column `r` of B, times `factor`."""
    return shorten(tl.load(b + n * RANK + r, mask=n < outputs, other=0.0).to(tl.float32) * factor)[:, None]


@triton.jit
def right(a, k, r, INPUTS: tl.constexpr):
    """Row `r` of A."""
    return shorten(tl.load(a + r * INPUTS + k, mask=k < INPUTS, other=0.0).to(tl.float32))[None, :]


@triton.jit
def gained(s, gain):
    """The scales `s` of rows with this `gain`, as `arithmetic.gains` has them on grids of qkit's own; NaN stays."""
    # The tensor comes first: Triton 3.7 interprets no product of a constant and a tensor.
    made = s * tl.minimum(tl.maximum(gain * UNIT + 1.0, LOWER), UPPER)
    made = tl.where(made > LARGEST, LARGEST, tl.where(made < -LARGEST, -LARGEST, made))
    return tl.where(tl.abs(made) < LEAST, tl.where(made < 0.0, -LEAST, LEAST), round_to_bfloat16(made))


@triton.jit
def decoded(
    codes, scales, zeros, power, gains, magic, n, there, first, CODES: tl.constexpr, SPREAD: tl.constexpr, GROUP: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A tile [BR, BC] of the base that packed codes are, in float32; `first`: its first column. `CODES`: see `cuda_merge`."""
    INPUTS: tl.constexpr = CODES[0]
    ELEMENT: tl.constexpr = CODES[1]
    HIGH: tl.constexpr = CODES[2]
    LOW: tl.constexpr = CODES[3]
    UNIT: tl.constexpr = CODES[4]
    UNITS: tl.constexpr = CODES[5]
    GROUPS: tl.constexpr = CODES[6]
    SCALES: tl.constexpr = CODES[7]
    PARTS: tl.constexpr = BC // GROUP
    rows = n[:, None].to(tl.int64)
    k = first // 2 + tl.arange(0, BC // 2)[None, :]
    inside = there & (2 * k < INPUTS)
    codes += rows * (UNITS * UNIT * (HIGH + LOW) // 32)
    even, odd = codes_at(codes, k, inside, HIGH, UNIT)
    if LOW > 0:
        low_even, low_odd = codes_at(codes + UNITS * UNIT * HIGH // 32, k, inside, LOW, UNIT)
        even, odd = even << LOW | low_even, odd << LOW | low_odd
    v = tl.interleave(whole(even, 0.0, magic, ELEMENT, HIGH), whole(odd, 0.0, magic, ELEMENT, HIGH))
    v = tl.reshape(v, (BR, PARTS, GROUP))
    tensor = 1.0
    if power is not None:
        tensor = tl.load(power)
    g = first // GROUP + tl.arange(0, PARTS)[None, :]
    known = there & (g < GROUPS)
    if ELEMENT == "integer":
        z = 2.0 ** (HIGH + LOW - 1)
        if zeros is not None:
            z = tl.load(zeros + rows * GROUPS + g, mask=known, other=0).to(tl.float32)[:, :, None]
        v = v - z
    if SPREAD:
        column = first + tl.arange(0, BC)[None, :]
        level = ((n[:, None] * ROW + column * COLUMN) >> 24) & 0xFF
        d = tl.reshape((level.to(tl.float32) * 2.0 - 255.0) * 0.001953125, (BR, PARTS, GROUP))
        if zeros is None:
            outermost = tl.abs(v) == tl.max(tl.abs(v), axis=2)[:, :, None]
        else:
            outermost = (v == tl.max(v, axis=2)[:, :, None]) | (v == tl.min(v, axis=2)[:, :, None])
        v = tl.where(outermost, v, v + d)
    s = scale(scales + rows * GROUPS + g, known, tensor, SCALES)
    if gains is not None:
        s = gained(s, tl.load(gains + rows, mask=there, other=0.0))
    return tl.reshape(v * s[:, :, None], (BR, BC))


@triton.jit(do_not_specialize=["magic"])
def merged(
    base, scales, zeros, power, gains, b, a, out, outputs, factor, magic, INPUTS: tl.constexpr, RANK: tl.constexpr,
    CODES: tl.constexpr, SPREAD: tl.constexpr, GROUP: tl.constexpr, TYPE: tl.constexpr, GRID: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """base [outputs, INPUTS] + factor B A, rounded to the type named `TYPE`; then its values on `GRID`, if there is one -> out.

    Args:
        base: floats; or packed codes, where there are `CODES`, with scales, zeros and power as those of a converted layer.
        gains: float32 [outputs], of scales that train: those of the values on `GRID`, or of the base where there is none.
        b, a: [outputs, RANK] and [RANK, INPUTS], not shortened yet.
    """
    MERGED: tl.constexpr = type_named(TYPE)
    across: tl.constexpr = (INPUTS + BC - 1) // BC
    n = tl.program_id(0) // across * BR + tl.arange(0, BR)
    first = tl.program_id(0) % across * BC
    k = first + tl.arange(0, BC)
    there = (n[:, None] < outputs) & (k[None, :] < INPUTS)
    where = n[:, None].to(tl.int64) * INPUTS + k[None, :]
    if CODES is None:
        x = tl.load(base + where, mask=there, other=0.0).to(tl.float32)
    else:
        of_base = gains if GRID is None else None
        x = decoded(
            base, scales, zeros, power, of_base, magic, n, n[:, None] < outputs, first, CODES, SPREAD, GROUP, BR, BC
        )
    total = left(b, n, 0, outputs, factor, RANK) * right(a, k, 0, INPUTS)
    for r in range(1, RANK):
        total = total + left(b, n, r, outputs, factor, RANK) * right(a, k, r, INPUTS)
    x = narrow(x + total, MERGED, INTERPRETED).to(tl.float32)
    if GRID is not None:
        t = tl.reshape(x, (BR * (BC // GROUP), GROUP))
        high, low = extremes(t, GRID, INTERPRETED)
        s, reciprocal, z, _ = steps(high, low, 0, GRID, INTERPRETED)
        t = units(t, s, reciprocal, z, GRID, MERGED.primitive_bitwidth == 16, INTERPRETED)
        if gains is not None:
            gain = tl.load(gains + n, mask=n < outputs, other=0.0)[:, None]
            s = tl.reshape(gained(tl.reshape(s, (BR, BC // GROUP)), gain), (BR * (BC // GROUP),))
        t = t * s[:, None]
        x = narrow(tl.reshape(t, (BR, BC)), MERGED, INTERPRETED).to(tl.float32)
    tl.store(out + where, narrow(x, out.dtype.element_ty, INTERPRETED), mask=there)
