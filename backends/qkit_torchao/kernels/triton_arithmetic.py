"""The reference in Triton, on tiles [groups, group] of float32: extremes, steps, units. Device code; `triton_passes` calls it.

Bit for bit `arithmetic.rounding`. A division is a product with the reciprocal and one correction by the exact remainder. That
rounds as IEEE division does (Markstein, 1990), since the reciprocal does. Triton's interpreter has no fused multiply-add, and its
casts truncate: there it divides, and rounds before it casts. Adding and taking away 1.5 * 2^23 rounds to an integer. Maxima keep
NaN.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)  #: 1.5 * 2^23: the float32 whose neighbours are one apart
FINE = tl.constexpr(768.0)  #: 1.5 * 2^9: from 512 to 1024, neighbours are 2^-14 apart


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def floats(u):
    return u.to(tl.float32, bitcast=True)


@triton.jit
def quotient(x, s, reciprocal, INTERPRETED: tl.constexpr):
    """x / s, rounded as IEEE division rounds where `s` has 8 bits: the exact remainder corrects the product."""
    if INTERPRETED:
        y = x / s
    else:
        y = x * reciprocal
        y = tl.fma(tl.fma(-y, s, x), reciprocal, y)
    return y


@triton.jit
def raised(x, s, reciprocal, LIFT: tl.constexpr, NARROW: tl.constexpr, INTERPRETED: tl.constexpr):
    """`LIFT` and a number that rounds to integers, and to floats of few bits, as the quotient of `x` and `s` does, below 256.

    Where `x` is `NARROW`, of 16 bits, and `s` has 8, the quotient is a tie of such a rounding or over 2^-15 away from all ties.
    So it may first be rounded to multiples of 2^-14, which ties are among: that undoes the error of the reciprocal.
    `tests/test_kernels` counts it out for all mantissas.
    """
    if NARROW and not INTERPRETED:
        y = tl.fma(x, reciprocal, FINE) + (LIFT - FINE)
    else:
        y = quotient(x, s, reciprocal, INTERPRETED) + LIFT
    return y


@triton.jit
def inverse(s, INTERPRETED: tl.constexpr):
    """1 / s, rounded as IEEE division rounds where `s` has 8 bits: a quotient within 2 units, mended by its exact remainder.

    That no mantissa of 8 bits comes so near a tie that the mended one rounds otherwise is counted out in `tests/test_kernels`.
    """
    r = 1.0 / s
    if not INTERPRETED:
        r = tl.fma(tl.fma(-s, r, 1.0), r, r)
    return r


@triton.jit
def nearest(y):
    return (y + MAGIC) - MAGIC


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def round_to_bfloat16(x):
    u = bits(x)
    return floats((u + 0x7FFF + ((u >> 16) & 1)) & -65536)


@triton.jit
def narrow(x, TYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """`x` in `TYPE`, rounded to nearest even."""
    if INTERPRETED and tl.bfloat16 == TYPE:
        x = round_to_bfloat16(x)
    return x.to(TYPE)


@triton.jit
def ceil_exponent(x):
    u = bits(x)
    return (u >> 23) + ((u & 0x7FFFFF) != 0).to(tl.int32)


@triton.jit
def small_float(y, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr):
    """`y`, no larger than the largest, to nearest even among the floats of this format; a zero has any sign.

    Adding and taking away 1.5 * 2^k rounds to multiples of 2^(k - 23), which are chosen to be as far apart as the floats are
    where `y` is.
    """
    binade = tl.maximum(bits(y) & 0x7F800000, (127 + MIN_EXPONENT) << 23)
    coarse = floats(binade + (((23 - MANTISSA) << 23) + 0x400000))
    return (y + coarse) - coarse


@triton.jit
def small_code(value, x, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, BITS: tl.constexpr):
    """The bits of a float of this format, given its value; the sign is that of `x`.

    Scaled so that the format's smallest normal number is float32's, its bits are the first ones of float32's, subnormal or not.
    """
    a = bits(tl.abs(value) * 2.0 ** (-126 - MIN_EXPONENT)) >> (23 - MANTISSA)
    return a | ((bits(x) >> (32 - BITS)) & (1 << (BITS - 1)))


@triton.jit
def small_value(code, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, BITS: tl.constexpr):
    """The inverse of `small_code`: the value whose bits `code` is."""
    magnitude = floats((code & ((1 << (BITS - 1)) - 1)) << (23 - MANTISSA)) * 2.0 ** (126 + MIN_EXPONENT)
    return floats(bits(magnitude) | ((code >> (BITS - 1)) << 31))


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def signs_matter(GRID: tl.constexpr):
    """Whether scales depend on the highest and the lowest value, not on the largest magnitude alone."""
    return GRID[0] == "signed" or GRID[0] == "minmax"


@triton.jit
def extremes(x, GRID: tl.constexpr, INTERPRETED: tl.constexpr):
    """The highest and the lowest value of each group of the tile `x` [groups, group], or the largest magnitude twice; or NaN."""
    if INTERPRETED:  # which leaves NaN out of a maximum, and takes its time over `reduce`
        poison = floats(tl.max(bits(x) & 0x7FFFFFFF, axis=1)) * 0.0
        if signs_matter(GRID):
            high, low = tl.max(x, axis=1) + poison, tl.min(x, axis=1) + poison
        else:
            high = tl.max(tl.abs(x), axis=1) + poison
            low = high
    elif signs_matter(GRID):
        high, low = tl.reduce(x, 1, larger), tl.reduce(x, 1, smaller)
    else:
        high = tl.reduce(tl.abs(x), 1, larger)
        low = high
    return high, low


@triton.jit
def tensor_code(tensor_peak, GRID: tl.constexpr):
    """The E8M0 code of a tensor's scale, for nvfp4; `tensor_peak`: the bits of its largest magnitude."""
    return tl.minimum(tl.maximum(ceil_exponent(floats(tensor_peak) * GRID[10]), GRID[8]), GRID[9])


@triton.jit
def steps(high, low, tensor_peak, GRID: tl.constexpr, INTERPRETED: tl.constexpr):
    """Of groups with these extremes: the step, its reciprocal, the zero point, and the stored scale. `GRID`: `plans.constants`.

    Steps are NaN where the group is not finite. The stored scale is the step itself, an E8M0 code, or the value of an e4m3.
    `tensor_peak`: the bits of the tensor's largest magnitude, for nvfp4.
    """
    RULE: tl.constexpr = GRID[0]
    STEP: tl.constexpr = GRID[1]
    LEAST: tl.constexpr = GRID[7]
    if GRID[4] == 0:
        z = high * 0.0
        if RULE == "signed":
            peak = tl.where(high >= -low, high, low)
            s = round_to_bfloat16(peak * STEP)
            s = tl.where(tl.abs(s) < LEAST, tl.where(bits(peak) > 0, -LEAST, LEAST), s) + peak * 0.0
        elif RULE == "minmax":
            low, high = smaller(low, 0.0), larger(high, 0.0)
            s = tl.maximum(round_to_bfloat16((high - low) * STEP), LEAST) + (high - low) * 0.0
        else:
            s = tl.maximum(round_to_bfloat16(high * STEP), LEAST) + high * 0.0
        stored = s
        reciprocal = inverse(s, INTERPRETED)
        if RULE == "minmax":
            z = clamp(nearest(quotient(0.0 - low, s, reciprocal, INTERPRETED)), GRID[2], GRID[3])
    elif RULE == "nvfp4":
        c = tensor_code(tensor_peak, GRID)
        stored = small_float(clamp(high * floats((254 - c) << 23) * STEP, GRID[11], 448.0), 3, -6)
        s = stored * (floats(c << 23) + floats(tensor_peak) * 0.0)
        reciprocal = inverse(s, INTERPRETED)
        z = s
    else:
        if RULE == "floor":
            c = (bits(high) >> 23) - GRID[6]
        elif RULE == "even":
            c = ((bits(high) + (1 << (22 - GRID[4]))) >> 23) - GRID[6]
        else:
            c = ceil_exponent(high * STEP)
        stored = tl.minimum(tl.maximum(c, GRID[8]), GRID[9])
        s = floats(stored << 23) + high * 0.0
        reciprocal = floats((254 - stored) << 23)
        z = s
    return s, reciprocal, z, stored


@triton.jit
def units(x, s, reciprocal, z, GRID: tl.constexpr, NARROW: tl.constexpr, INTERPRETED: tl.constexpr):
    """The tile `x` in units of its steps: codes of integers, zero points taken away, and values of small floats.

    Rules whose steps leave nothing to clip do not clip. A step is too short by at most its 2^-8th, so that a peak is at
    most 127 * (1 + 2^-8) steps from zero under `absmax`, and rounds to the lowest code or above under `signed` and `midmax`.
    """
    RULE: tl.constexpr = GRID[0]
    HIGH: tl.constexpr = GRID[3]
    if GRID[4] == 0:
        y = lifted(x, s, reciprocal, z, GRID, NARROW, INTERPRETED) - MAGIC
    else:
        if RULE == "nvfp4":
            y = raised(x, s[:, None], reciprocal[:, None], 0.0, NARROW, INTERPRETED)
        else:
            y = x * reciprocal[:, None]
        if RULE != "rceil":
            y = tl.clamp(y, -HIGH, HIGH)  # one instruction, since both bounds are one magnitude
        y = small_float(y, GRID[4], GRID[5])
    return y


@triton.jit
def lifted(x, s, reciprocal, z, GRID: tl.constexpr, NARROW: tl.constexpr, INTERPRETED: tl.constexpr):
    """`units` of integers, and `MAGIC` more: the last bits of such a float are the integer, which need not be converted."""
    y = raised(x, s[:, None], reciprocal[:, None], MAGIC, NARROW, INTERPRETED)
    if GRID[0] == "minmax":
        # `tl.sub`, since in the interpreter of Triton 3.7 a constant minus a tensor is a constant
        y = clamp(y, tl.sub(MAGIC + GRID[2], z[:, None]), tl.sub(MAGIC + GRID[3], z[:, None]))
    elif GRID[0] != "absmax":
        y = tl.minimum(y, MAGIC + GRID[3])
    return y


@triton.jit
def place(base, block, column, TYPE: tl.constexpr):
    """The address in `column` of a row of a table, in elements from `base` on; the compiler is shown that 16 bytes divide it."""
    SHIFT: tl.constexpr = 2 if TYPE.primitive_bitwidth == 32 else 3
    return base + ((tl.load(block + column) >> SHIFT) << SHIFT)


@triton.jit
def tile(count, GROUPS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """Offsets of `GROUPS` groups, and which of them are elements where there are `count` groups: all, if `FULL`."""
    rows = tl.arange(0, GROUPS)
    columns = tl.arange(0, WIDTH)
    offsets = rows[:, None] * GROUP + columns[None, :]
    if FULL:
        mask = tl.full((GROUPS, WIDTH), True, tl.int1)  # which the compiler takes away
    else:
        mask = (rows[:, None] < count) & (columns[None, :] < GROUP)
    return offsets, mask


@triton.jit
def load(address, mask):
    """The elements at `address`, in float32; 0 where there is none, if there is a mask."""
    if mask is None:
        x = tl.load(address)
    else:
        x = tl.load(address, mask=mask, other=0.0)
    return x.to(tl.float32)
