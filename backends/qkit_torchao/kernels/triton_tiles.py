"""Device code that decodes tiles of the layout `words`, to memory or for tensor cores, see `arithmetic.words`; `cuda_words` calls it.

A tile is words of the high plane, and every step is by word: a word has one scale, and the columns of its codes lie apart by a
number that is known at compile time.
"""

import triton
import triton.language as tl

from qkit_torchao.kernels.triton_arithmetic import narrow
from qkit_torchao.kernels.triton_words import bias_of, low_words, number, place, scale


@triton.jit(do_not_specialize=["magic"])
def decode(
    codes, scales, zeros, power, out, outputs, magic, INPUTS: tl.constexpr, ELEMENT: tl.constexpr, HIGH: tl.constexpr,
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
    TYPE: tl.constexpr = tl.bfloat16 if KIND == "bfloat16" else tl.float16
    pairs = out + n.to(tl.int64) * (INPUTS // 2) + t // WORDS * (UNIT // 2) + t % WORDS
    for k in tl.static_range(16 // HIGH):
        even = short(words, more, s, z, 2 * k, magic, ELEMENT, HIGH, LOW, zeros is None, TYPE, INTERPRETED)
        odd = short(words, more, s, z, 2 * k + 1, magic, ELEMENT, HIGH, LOW, zeros is None, TYPE, INTERPRETED)
        low, high = even.to(tl.int16, bitcast=True).to(tl.int32), odd.to(tl.int16, bitcast=True).to(tl.int32)
        tl.store(pairs + k * WORDS, (low & 0xFFFF) | (high << 16), mask=known)


@triton.jit(do_not_specialize=["count", "magic"])
def product(
    x, codes, scales, zeros, power, bias, out, outputs, count, magic, INPUTS: tl.constexpr, ELEMENT: tl.constexpr,
    HIGH: tl.constexpr, LOW: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    SCALES: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """x [count, 32 / HIGH, words] times codes [outputs, words] -> out [SPLIT, count, outputs], on tensor cores.

    Values are rounded to the type of x first, as `decode` rounds them. Row r of x has its inputs in the order of codes in words:
    first those of code 0 of every word. Program (b, j) takes `BN` outputs and the words from `STEPS BW` j on.
    """
    WORDS: tl.constexpr = UNIT * HIGH // 32
    blocks = tl.cdiv(outputs, BN)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)[:, None]
    rest = tl.program_id(0) // blocks
    begin = rest % SPLIT * (STEPS * BW)
    row = rest // SPLIT * ROWS + tl.arange(0, ROWS)[None, :]
    x += row.to(tl.int64) * INPUTS
    total = tl.zeros([BN, ROWS], tl.float32)
    for step in range(0, STEPS * BW, BW):
        t = begin + step + tl.arange(0, BW)
        across = t[None, :]
        known = (n < outputs) & (across < UNITS * WORDS)
        words, more, s, z = tile(
            codes, scales, zeros, power, n, across, known, HIGH, LOW, UNIT, UNITS, GROUP, GROUPS, SCALES
        )
        there = (t[:, None] < UNITS * WORDS) & (row < count)
        for i in tl.static_range(32 // HIGH):
            a = tl.load(x + i * (UNITS * WORDS) + t[:, None], mask=there, other=0.0)
            v = short(words, more, s, z, i, magic, ELEMENT, HIGH, LOW, zeros is None, x.dtype.element_ty, INTERPRETED)
            if INTERPRETED:  # it multiplies the bits of bfloat16 as integers
                v, a = v.to(tl.float32), a.to(tl.float32)
            total = tl.dot(v, a, total)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)[:, None]
    if bias is not None:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    where = out + (rest % SPLIT * count + row).to(tl.int64) * outputs + n
    tl.store(where, narrow(total, out.dtype.element_ty, INTERPRETED), mask=(n < outputs) & (row < count))


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
    words, more, s, z, i: tl.constexpr, magic, ELEMENT: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    CENTERED: tl.constexpr, TYPE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The value of code `i` of each word, rounded once to `TYPE`."""
    f = number(words, more, i, magic, ELEMENT, HIGH, LOW, CENTERED)
    f = f * (
        place(i, ELEMENT, HIGH, LOW) * bias_of(ELEMENT)
    )  # exact, as the next, where factors of scales might not be
    return narrow((f if CENTERED else f - z) * s, TYPE, INTERPRETED)
