"""Device code that reads codes in the layout `words`, see `arithmetic.words`, and multiplies those of two sides.

An integer is put into the mantissa of 2^23, so that a subtraction makes a float of it. A small float is put into a float16, whose
exponents have another bias. Sums are in float32.
"""

import triton
import triton.language as tl

from qkit_torchao.kernels.triton_arithmetic import narrow

MAGIC = 0x4B000000  #: 2^23 as float32; an argument, since a compiler that knows it takes two operations for one
SIGNS = tl.constexpr(0x80008000 - (1 << 32))  #: of two float16 in a word


@triton.jit
def low_words(
    low, unit, word, known, WORDS: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The low bits of each word of the high plane, shifted so that those of its codes 2k and 2k + 1 begin at bit 2k `HIGH`."""
    more = 0
    if LOW > 0:
        LWORDS: tl.constexpr = UNIT * LOW // 32
        more = tl.load(low + unit * LWORDS + word % LWORDS, mask=known, other=0, eviction_policy="evict_first")
        more = more >> (word // LWORDS * (2 * LOW))
    return more


@triton.constexpr_function
def place(i, ELEMENT, HIGH, LOW):
    """The factor of code `i` of a word that `number` leaves out."""
    return 2.0 ** -(i * HIGH % 16) if ELEMENT == "integer" and not LOW else 1.0


@triton.constexpr_function
def bias_of(ELEMENT):
    """The factor of all codes that `number` leaves out: the difference of the biases of two exponents."""
    return {"e2m1": 2.0**14, "e4m3": 2.0**8}.get(ELEMENT, 1.0)


@triton.jit
def half(word, H: tl.constexpr):
    """Float16 number `H` of a word, as float32."""
    h = word if H == 0 else word >> 16
    return h.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def number(
    words, more, i: tl.constexpr, magic, ELEMENT: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
    CENTERED: tl.constexpr,
):  # fmt: skip
    """Code `i` of each word as float32, but for `place` and `bias_of`. `CENTERED`: less by half of the count of codes."""
    if ELEMENT == "integer":
        HALF: tl.constexpr = 1 << HIGH + LOW - 1 if CENTERED else 0
        if LOW > 0:
            UP: tl.constexpr = LOW - i * HIGH
            h = words << UP if UP >= 0 else words >> -UP
            low = more >> (i // 2 * 2 * HIGH + i % 2 * LOW)
            code = (h & (((1 << HIGH) - 1) << LOW)) | (low & ((1 << LOW) - 1))
            f = (code | magic).to(tl.float32, bitcast=True) - (8388608.0 + HALF)
        else:
            PLACE: tl.constexpr = i * HIGH % 16
            h = words if i * HIGH < 16 else words >> 16
            f = ((h & (((1 << HIGH) - 1) << PLACE)) | magic).to(tl.float32, bitcast=True) - (
                8388608.0 + (HALF << PLACE)
            )
    else:
        f = half(small(words << (16 - HIGH - i * HIGH % 16), ELEMENT), i * HIGH // 16)
    return f


@triton.jit
def small(words, ELEMENT: tl.constexpr):
    """Small floats in the high bits of the two halves of words -> float16, but for the bias."""
    if ELEMENT == "e2m1":
        h = (words & SIGNS) | ((words >> 3) & 0x0E000E00)
    elif ELEMENT == "e4m3":
        h = (words & SIGNS) | ((words >> 1) & 0x3F803F80)
    else:
        h = words & -16711936  # 0xFF00FF00
    return h


@triton.jit
def scale(address, there, tensor, SCALES: tl.constexpr):
    """Scales as float32: of floats, or of bytes that are exponents (`e8m0`) or `e4m3`, the latter times or over the tensor's.

    `any e8m0`: 0 is the subnormal 2^-127, and 255 is no number.
    """
    s = tl.load(address, mask=there, other=0)
    if SCALES == "e8m0":
        s = (s.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif SCALES == "any e8m0":
        u = s.to(tl.int32)
        u = tl.where(u == 0, 0x400000, tl.where(u == 255, 0x7FC00000, u << 23))
        s = u.to(tl.float32, bitcast=True)
    elif SCALES == "e4m3 over":
        s = half(small(s.to(tl.int32) << 8, "e4m3"), 0) * 256.0
        s = tl.div_rn(s, tl.broadcast_to(tensor, s.shape))
    elif SCALES == "e4m3" or SCALES == "e4m3 times":
        s = half(small(s.to(tl.int32) << 8, "e4m3"), 0) * 256.0 * tensor
    else:
        s = s.to(tl.float32)
    return s


@triton.jit
def value(x, s, b, INTERPRETED: tl.constexpr):
    """x * s, plus `b` where there is one, in float32 and each rounded once.

    The compiler would join a product with a sum, and make a product of float16 where both factors and the result are such.
    """
    if INTERPRETED:
        x = x * s
    else:
        x, s = tl.broadcast(x, s)
        x = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, s], dtype=tl.float32, is_pure=True, pack=1
        )
    if b is not None:
        if INTERPRETED:
            x = x + b
        else:
            x = tl.inline_asm_elementwise(
                "add.rn.f32 $0, $1, $2;", "=f,f,f", [x, b], dtype=tl.float32, is_pure=True, pack=1
            )
    return x


@triton.jit(do_not_specialize=["count"])
def codes_product(
    x, codes, zeros, out, outputs, count, INPUTS: tl.constexpr, INTEGER: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """The product of codes of both sides, four to a word: x [count, INPUTS] and codes [outputs, INPUTS] -> out [count, outputs].

    Of int8, less `zeros` int8 [count] of the rows of x, in int32; of e4m3, in float32.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.arange(0, ROWS)
    t = tl.arange(0, BW)[None, None, :]
    TYPE: tl.constexpr = tl.int32 if INTEGER else tl.float32
    zero = 0
    if zeros is not None:
        zero = tl.load(zeros + rows, mask=rows < count, other=0).to(tl.int32)[:, None, None]
    sums = tl.zeros([ROWS, BN, BW], TYPE)
    for begin in range(0, INPUTS // 4, BW):
        known = begin + t < INPUTS // 4
        a = tl.load(
            codes + n[None, :, None].to(tl.int64) * (INPUTS // 4) + begin + t, mask=known & (n < outputs)[None, :, None],
            other=0, eviction_policy="evict_first",
        )  # fmt: skip
        b = tl.load(
            x + rows[:, None, None] * (INPUTS // 4) + begin + t, mask=known & (rows < count)[:, None, None], other=0
        )
        for i in tl.static_range(4):
            if INTEGER:
                sums += (a << (24 - 8 * i) >> 24) * ((b << (24 - 8 * i) >> 24) - zero)
            else:
                sums += byte(a, i) * byte(b, i)
    total = tl.sum(sums, axis=2)
    if not INTEGER:
        total *= 65536.0
    where = out + rows[:, None] * outputs + n[None, :]
    tl.store(where, total, mask=(rows < count)[:, None] & (n < outputs)[None, :])


@triton.jit
def byte(words, i: tl.constexpr):
    """The e4m3 number `i` of words as float32, but for the factor 2^-8."""
    return half(small(words << (8 - i % 2 * 8), "e4m3"), i // 2)


@triton.jit(do_not_specialize=["outputs"])
def scaled(
    product, steps, scales, bias, out, outputs, ONE: tl.constexpr, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr
):
    """out = product * steps * scales + bias, in float32, rounded once: [rows, outputs], in parts of rows of `WIDTH` outputs.

    `ONE`: whether one scale serves all outputs.
    """
    across = tl.cdiv(outputs, WIDTH)
    row = (tl.program_id(0) // across).to(tl.int64)
    n = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
    there = n < outputs
    y = tl.load(product + row * outputs + n, mask=there, other=0).to(tl.float32) * tl.load(steps + row)
    y *= tl.load(scales) if ONE else tl.load(scales + n, mask=there, other=0.0)
    if bias is not None:
        y += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * outputs + n, narrow(y, out.dtype.element_ty, INTERPRETED), mask=there)
