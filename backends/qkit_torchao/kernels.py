"""The reference in Triton, one pass over memory: a tile of groups in, values or codes out. Device code only; `launch` calls it.

Bit for bit `ops`. A division is a product with the reciprocal and one correction by the exact remainder, which rounds as IEEE
division does (Markstein, 1990). Triton's interpreter has no fused multiply-add and casts by cutting off: there it divides, and
rounds before it casts. Rounding to an integer is adding and taking away 1.5 * 2^23. Extremes are found on bits, which keep NaN.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)  #: 1.5 * 2^23: the float32 whose neighbours are one apart


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def floats(u):
    return u.to(tl.float32, bitcast=True)


@triton.jit
def quotient(x, s, reciprocal, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        y = x / s
    else:
        y = x * reciprocal
        y = tl.fma(tl.fma(-y, s, x), reciprocal, y)
    return y


@triton.jit
def inverse(s, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        r = 1.0 / s
    else:
        r = tl.div_rn(1.0, s)
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
def small_float(y, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, LARGEST: tl.constexpr):
    """`y`, clamped, to nearest even among the floats of this format."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    COARSE: tl.constexpr = 1.5 * 2.0 ** (SHIFT + MIN_EXPONENT)  # its neighbours are one smallest step apart
    y = clamp(y, -LARGEST, LARGEST)
    u = bits(y)
    a = u & 0x7FFFFFFF
    normal = (a + ((1 << (SHIFT - 1)) - 1) + ((a >> SHIFT) & 1)) & (-1 << SHIFT)
    subnormal = bits((floats(a) + COARSE) - COARSE)
    rounded = tl.where(a >= ((127 + MIN_EXPONENT) << 23), normal, subnormal)
    return floats(rounded | (u & -2147483648))


@triton.jit
def small_code(value, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, BITS: tl.constexpr):
    """The bits of a float of this format, given its value."""
    SHIFT: tl.constexpr = 23 - MANTISSA
    u = bits(value)
    a = u & 0x7FFFFFFF
    normal = (a >> SHIFT) - ((126 + MIN_EXPONENT) << MANTISSA)
    subnormal = (floats(a) * 2.0 ** (MANTISSA - MIN_EXPONENT)).to(tl.int32)
    magnitude = tl.where(a >= ((127 + MIN_EXPONENT) << 23), normal, subnormal)
    return magnitude | ((u >> (32 - BITS)) & (1 << (BITS - 1)))


@triton.jit
def small_value(code, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, BITS: tl.constexpr):
    """The inverse of `small_code`: the value whose bits `code` is."""
    magnitude = code & ((1 << (BITS - 1)) - 1)
    normal = (magnitude << (23 - MANTISSA)) + ((126 + MIN_EXPONENT) << 23)
    subnormal = bits(magnitude.to(tl.float32) * 2.0 ** (MIN_EXPONENT - MANTISSA))
    rest = tl.where(magnitude >= (1 << MANTISSA), normal, subnormal)
    return floats(rest | ((code >> (BITS - 1)) << 31))


@triton.jit
def integer_scale(x, RULE: tl.constexpr, STEP: tl.constexpr, LEVELS: tl.constexpr, LEAST: tl.constexpr):
    """Scale and zero point of each group of the tile `x` [groups, group]; NaN where the group is not finite."""
    u = bits(x)
    peak = tl.max(u & 0x7FFFFFFF, axis=1)
    z = tl.zeros_like(floats(peak))
    if RULE == "signed":
        signed = tl.where(tl.max(u, axis=1) == peak, floats(peak), -floats(peak))
        s = round_to_bfloat16(signed * STEP)
        least = tl.where(bits(signed) > 0, -LEAST, LEAST)
        s = tl.where(tl.abs(s) < LEAST, least, s)
    elif RULE == "minmax":
        low = tl.minimum(tl.min(x, axis=1), 0.0)
        high = tl.maximum(tl.max(x, axis=1), 0.0)
        s = tl.maximum(round_to_bfloat16((high - low) * STEP), LEAST) + (high - low) * 0.0
        z = clamp(nearest(tl.div_rn(0.0 - low, s)), 0.0, LEVELS)
    else:
        s = tl.maximum(round_to_bfloat16(floats(peak) * STEP), LEAST)
    return s + floats(peak) * 0.0, z


@triton.jit
def power_scale(
    x, RULE: tl.constexpr, STEP: tl.constexpr, MANTISSA: tl.constexpr, MAX_EXPONENT: tl.constexpr,
    LEAST: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """E8M0 code of each group of the tile `x`, and 0 or, where the group is not finite, NaN."""
    peak = tl.max(bits(x) & 0x7FFFFFFF, axis=1)
    if RULE == "floor":
        c = (peak >> 23) - MAX_EXPONENT
    elif RULE == "even":
        c = ((peak + (1 << (22 - MANTISSA))) >> 23) - MAX_EXPONENT
    else:
        c = ceil_exponent(floats(peak) * STEP)
    return tl.minimum(tl.maximum(c, LEAST), MOST), floats(peak) * 0.0


@triton.jit
def tensor_power(peak, STEP: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    """NVFP4's power of two of a tensor whose largest magnitude has the bits `peak`, as an E8M0 code; and 0 or NaN."""
    c = ceil_exponent(floats(peak) * STEP)
    return tl.minimum(tl.maximum(c, LEAST), MOST), floats(peak) * 0.0


@triton.jit
def block_scale(x, c, STEP: tl.constexpr, LEAST: tl.constexpr):
    """NVFP4's block scales of the tile `x`, as e4m3 values, under the power of two with code `c`."""
    peak = floats(tl.max(bits(x) & 0x7FFFFFFF, axis=1))
    down = floats((254 - c) << 23)
    return small_float(tl.maximum(peak * down * STEP, LEAST), 3, -6, 448.0)


@triton.jit
def quantized(x, tensor_peak, GRID: tl.constexpr, INTERPRETED: tl.constexpr):
    """The tile `x` [groups, group] of float32 in units of its steps, the steps, what is stored for each group, and zero points.

    The units are codes of integers, zero points taken away, and values of small floats. What is stored is the step itself, an
    E8M0 code, or the value of an e4m3. `GRID` is `launch.constants(grid)`.
    """
    RULE: tl.constexpr = GRID[0]
    STEP: tl.constexpr = GRID[1]
    LOW: tl.constexpr = GRID[2]
    HIGH: tl.constexpr = GRID[3]
    MANTISSA: tl.constexpr = GRID[4]
    MIN_EXPONENT: tl.constexpr = GRID[5]
    if MANTISSA == 0:
        s, z = integer_scale(x, RULE, STEP, HIGH, GRID[7])
        y = nearest(quotient(x, s[:, None], inverse(s, INTERPRETED)[:, None], INTERPRETED))
        if RULE == "minmax":
            y = clamp(y + z[:, None], LOW, HIGH) - z[:, None]
        else:
            y = clamp(y, LOW, HIGH)
        stored = s
    elif RULE == "nvfp4":
        c, poison = tensor_power(tensor_peak, GRID[10], GRID[8], GRID[9])
        stored = block_scale(x, c, STEP, GRID[11])
        s = stored * (floats(c << 23) + poison)
        y = small_float(
            quotient(x, s[:, None], inverse(s, INTERPRETED)[:, None], INTERPRETED), MANTISSA, MIN_EXPONENT, HIGH
        )
        z = s
    else:
        stored, poison = power_scale(x, RULE, STEP, MANTISSA, GRID[6], GRID[8], GRID[9])
        y = small_float(x * floats((254 - stored) << 23)[:, None], MANTISSA, MIN_EXPONENT, HIGH)
        s = floats(stored << 23) + poison
        z = s
    return y, s, stored, z


@triton.jit
def place(base, row, TYPE: tl.constexpr):
    """The address `row` holds, in elements from `base` on; both are multiples of 16 bytes, which the compiler is shown."""
    SHIFT: tl.constexpr = 2 if TYPE.primitive_bitwidth == 32 else 3
    return base + ((tl.load(row) >> SHIFT) << SHIFT)


@triton.jit
def tile(first, count, GROUPS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of `GROUPS` groups from group `first` on, and which of them are elements of a tensor of `count` groups."""
    rows = tl.arange(0, GROUPS)
    columns = tl.arange(0, WIDTH)
    offsets = rows[:, None] * GROUP + columns[None, :]
    mask = (rows[:, None] < count - first) & (columns[None, :] < GROUP)
    return offsets, mask
