"""Device code that decodes codes in the layout `words`, and packs them into it, see `arithmetic.words`; `cuda_words` calls it."""

import triton
import triton.language as tl

from qkit_torchao.kernels.triton_arithmetic import narrow
from qkit_torchao.kernels.triton_words import bias_of, half, scale, small, value


@triton.jit(do_not_specialize=["magic"])
def decode(
    codes, scales, zeros, power, biases, out, outputs, magic, INPUTS: tl.constexpr, ELEMENT: tl.constexpr, HIGH: tl.constexpr,
    LOW: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SCALES: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The values [outputs, INPUTS] of codes, rounded once to the type of `out`. Groups may have any length."""
    across: tl.constexpr = (INPUTS + 2 * BK - 1) // (2 * BK)
    n = tl.program_id(0) // across * BN + tl.arange(0, BN)
    first = tl.program_id(0) % across * BK
    k = first + tl.arange(0, BK)[None, :]
    rows = n[:, None].to(tl.int64)
    there = (n[:, None] < outputs) & (2 * k < INPUTS)
    codes += rows * (UNITS * UNIT * (HIGH + LOW) // 32)
    even, odd = codes_at(codes, k, there, HIGH, UNIT)
    if LOW > 0:
        low_even, low_odd = codes_at(codes + UNITS * UNIT * HIGH // 32, k, there, LOW, UNIT)
        even, odd = even << LOW | low_even, odd << LOW | low_odd
    tensor = 1.0
    if power is not None:
        tensor = tl.load(power)
    scales += rows * GROUPS
    if zeros is not None:
        zeros += rows * GROUPS
    if biases is not None:
        biases += rows * GROUPS
    MIDDLE: tl.constexpr = 0.0 if biases is not None else 2.0 ** (HIGH + LOW - 1)
    g = 2 * k // GROUP
    s, z = scale(scales + g, there, tensor, SCALES), zero_point(zeros, g, there, MIDDLE)
    x = value(whole(even, z, magic, ELEMENT, HIGH), s, bias(biases, g, there), INTERPRETED)
    if GROUP % 2:
        g = (2 * k + 1) // GROUP
        there = there & (2 * k + 1 < INPUTS)
        s, z = scale(scales + g, there, tensor, SCALES), zero_point(zeros, g, there, MIDDLE)
    y = value(whole(odd, z, magic, ELEMENT, HIGH), s, bias(biases, g, there), INTERPRETED)
    column = 2 * first + tl.arange(0, 2 * BK)[None, :]
    both = narrow(tl.interleave(x, y), out.dtype.element_ty, INTERPRETED)
    tl.store(out + rows * INPUTS + column, both, mask=(n[:, None] < outputs) & (column < INPUTS))


@triton.jit
def codes_at(codes, k, there, BITS: tl.constexpr, UNIT: tl.constexpr):
    """The bits of columns 2k and 2k + 1 in a plane of `BITS`."""
    WORDS: tl.constexpr = UNIT * BITS // 32
    inner = k % (UNIT // 2)
    words = tl.load(codes + k // (UNIT // 2) * WORDS + inner % WORDS, mask=there, other=0) >> (
        inner // WORDS * (2 * BITS)
    )
    return words & ((1 << BITS) - 1), (words >> BITS) & ((1 << BITS) - 1)


@triton.jit
def zero_point(zeros, g, there, MIDDLE: tl.constexpr):
    """The zero points of groups; where there are none, `MIDDLE`."""
    z = MIDDLE
    if zeros is not None:
        z = tl.load(zeros + g, mask=there, other=0).to(tl.float32)
    return z


@triton.jit
def bias(biases, g, there):
    """The biases of groups, if there are any."""
    b = None
    if biases is not None:
        b = tl.load(biases + g, mask=there, other=0).to(tl.float32)
    return b


@triton.jit
def whole(codes, zero, magic, ELEMENT: tl.constexpr, BITS: tl.constexpr):
    """The values of codes, before their scales."""
    if ELEMENT == "integer":
        f = (codes | magic).to(tl.float32, bitcast=True) - (zero + 8388608.0)
    else:
        f = half(small(codes << (16 - BITS), ELEMENT), 0) * bias_of(ELEMENT)
    return f


@triton.jit
def pack(
    codes, words, outputs, INPUTS: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr, BELOW: tl.constexpr,
    UNIT: tl.constexpr, UNITS: tl.constexpr, STRIDE: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """One plane of codes [outputs, INPUTS], a byte each: their `BITS` above the last `BELOW`, once `OFFSET` is added."""
    WORDS: tl.constexpr = UNIT * BITS // 32
    n = (tl.program_id(0) * BN + tl.arange(0, BN))[:, None]
    t = (tl.program_id(1) * BW + tl.arange(0, BW))[None, :]
    there = (n < outputs) & (t < UNITS * WORDS)
    word = tl.zeros([BN, BW], tl.int32)
    for i in tl.static_range(32 // BITS):
        k = t // WORDS * UNIT + i // 2 * 2 * WORDS + t % WORDS * 2 + i % 2
        known = there & (k < INPUTS)
        c = tl.load(codes + n.to(tl.int64) * INPUTS + k, mask=known, other=0).to(tl.int32)
        c = tl.where(known, c + OFFSET, 0)
        word |= (c >> BELOW & (1 << BITS) - 1) << (BITS * i)
    tl.store(words + n.to(tl.int64) * STRIDE + t, word, mask=there)
