"""Device code that decodes tiles of the layout `words`, to memory or for tensor cores; `cuda_words` calls it.

A tile is words of the high plane, and every step is by word: a word has one scale, and the columns of its codes lie apart by a
number that is known at compile time.
"""

import triton
import triton.language as tl

from qkit_torchao.kernels.triton_arithmetic import narrow
from qkit_torchao.kernels.triton_unpack import bias
from qkit_torchao.kernels.triton_words import bias_of, low_words, number, place, scale, value


@triton.jit(do_not_specialize=["magic"])
def decode(
    codes, scales, zeros, power, biases, out, outputs, magic, INPUTS: tl.constexpr, ELEMENT: tl.constexpr, HIGH: tl.constexpr,
    LOW: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SCALES: tl.constexpr,
    KIND: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The values [outputs, INPUTS] of codes, rounded once to the 16-bit type `KIND`; `out` is their pairs, as int32.

    A program takes `BN` rows and `BW` words of the high plane of each. Inputs are whole units, and groups too.
    """
    WORDS: tl.constexpr = UNIT * HIGH // 32
    across: tl.constexpr = (UNITS * WORDS + BW - 1) // BW
    n = tl.program_id(0) // across * BN + tl.arange(0, BN)[:, None]
    t = tl.program_id(0) % across * BW + tl.arange(0, BW)[None, :]
    known = (n < outputs) & (t < UNITS * WORDS)
    words, more, s, z = tile(codes, scales, zeros, power, n, t, known, HIGH, LOW, UNIT, UNITS, GROUP, GROUPS, SCALES)
    b = bias(biases, n.to(tl.int64) * GROUPS + t // WORDS * UNIT // GROUP, known)
    TYPE: tl.constexpr = tl.bfloat16 if KIND == "bfloat16" else tl.float16
    CENTERED: tl.constexpr = zeros is None and biases is None
    p0 = two(words, more, s, z, b, 0, magic, ELEMENT, HIGH, LOW, CENTERED, TYPE, INTERPRETED)
    p1 = two(words, more, s, z, b, 1, magic, ELEMENT, HIGH, LOW, CENTERED, TYPE, INTERPRETED)
    if HIGH == 8:
        pairs = tl.join(p0, p1)
    else:
        p2 = two(words, more, s, z, b, 2, magic, ELEMENT, HIGH, LOW, CENTERED, TYPE, INTERPRETED)
        p3 = two(words, more, s, z, b, 3, magic, ELEMENT, HIGH, LOW, CENTERED, TYPE, INTERPRETED)
        if HIGH == 4:
            pairs = tl.join(tl.join(p0, p2), tl.join(p1, p3))
        else:
            p4 = two(words, more, s, z, b, 4, magic, ELEMENT, HIGH, LOW, CENTERED, TYPE, INTERPRETED)
            p5 = two(words, more, s, z, b, 5, magic, ELEMENT, HIGH, LOW, CENTERED, TYPE, INTERPRETED)
            p6 = two(words, more, s, z, b, 6, magic, ELEMENT, HIGH, LOW, CENTERED, TYPE, INTERPRETED)
            p7 = two(words, more, s, z, b, 7, magic, ELEMENT, HIGH, LOW, CENTERED, TYPE, INTERPRETED)
            evens, odds = tl.join(tl.join(p0, p4), tl.join(p2, p6)), tl.join(tl.join(p1, p5), tl.join(p3, p7))
            pairs = tl.join(evens, odds)
    COUNT: tl.constexpr = 16 // HIGH
    pairs = tl.permute(tl.reshape(pairs, (BN, BW // WORDS, WORDS, COUNT)), (0, 1, 3, 2))  # by columns
    column = tl.program_id(0) % across * (BW * COUNT) + tl.arange(0, BW * COUNT)[None, :]
    tl.store(
        out + n.to(tl.int64) * (INPUTS // 2) + column,
        tl.reshape(pairs, (BN, BW * COUNT)),
        mask=(n < outputs) & (column < INPUTS // 2),
    )


@triton.jit
def two(
    words, more, s, z, b, k: tl.constexpr, magic, ELEMENT: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    CENTERED: tl.constexpr, TYPE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The values of codes 2k and 2k + 1 of each word, in one int32."""
    even = short(words, more, s, z, b, 2 * k, magic, ELEMENT, HIGH, LOW, CENTERED, TYPE, INTERPRETED)
    odd = short(words, more, s, z, b, 2 * k + 1, magic, ELEMENT, HIGH, LOW, CENTERED, TYPE, INTERPRETED)
    low, high = even.to(tl.int16, bitcast=True).to(tl.int32), odd.to(tl.int16, bitcast=True).to(tl.int32)
    return (low & 0xFFFF) | (high << 16)


@triton.jit
def tile(
    codes, scales, zeros, power, n, t, known, HIGH: tl.constexpr, LOW: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Words `t` of rows `n`: those of both planes, their scales and their zero points."""
    WORDS: tl.constexpr = UNIT * HIGH // 32
    row = n.to(tl.int64)
    codes += row * (UNITS * UNIT * (HIGH + LOW) // 32)
    words = tl.load(codes + t, mask=known, other=0, eviction_policy="evict_first")
    more = low_words(codes + UNITS * UNIT * HIGH // 32, t // WORDS, t % WORDS, known, WORDS, HIGH, LOW, UNIT)
    tensor = 1.0
    if power is not None:
        tensor = tl.load(power)
    g = t // WORDS * UNIT // GROUP
    s = scale(scales + row * GROUPS + g, known, tensor, SCALES)
    z = 0.0
    if zeros is not None:
        z = tl.load(zeros + row * GROUPS + g, mask=known, other=0).to(tl.float32)
    return words, more, s, z


@triton.jit
def short(
    words, more, s, z, b, i: tl.constexpr, magic, ELEMENT: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    CENTERED: tl.constexpr, TYPE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The value of code `i` of each word, rounded once to `TYPE`."""
    f = number(words, more, i, magic, ELEMENT, HIGH, LOW, CENTERED)
    f = f * (
        place(i, ELEMENT, HIGH, LOW) * bias_of(ELEMENT)
    )  # exact, as the next, where factors of scales might not be
    return narrow(value(f if CENTERED else f - z, s, b, INTERPRETED), TYPE, INTERPRETED)
