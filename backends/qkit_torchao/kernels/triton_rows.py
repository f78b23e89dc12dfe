"""Device code of the product of many rows of int8 codes on tensor cores, with the scales of both sides applied where it ends.

A product that leaves int32 to another launch writes and reads four bytes an output more, which takes about as long as the sums.
"""

import triton
import triton.language as tl

from qkit_torchao.kernels.triton_arithmetic import narrow


@triton.jit(do_not_specialize=["count"])
def rows_product(
    x, codes, steps, scales, bias, out, count, outputs, INPUTS: tl.constexpr, ONE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out [count, outputs] = the sums of x [count, INPUTS] * codes [outputs, INPUTS], * steps * scales + bias, rounded once.

    Sums are int32 and exact; the rest is float32, in this order, as in `triton_words.scaled`. `ONE`: one scale for all outputs.
    Programs go through bands of `BAND` tiles of rows, which share codes in the cache.
    """
    tall, wide = tl.cdiv(count, BM), tl.cdiv(outputs, BN)
    band = tl.program_id(0) // (BAND * wide)
    height = min(tall - band * BAND, BAND)
    place = tl.program_id(0) % (BAND * wide)
    row = (band * BAND + place % height) * BM + tl.arange(0, BM)
    n = place // height * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a = x + (row % count).to(tl.int64)[:, None] * INPUTS + k[None, :]
    b = codes + (n % outputs).to(tl.int64)[None, :] * INPUTS + k[:, None]
    sums = tl.zeros([BM, BN], tl.int32)
    for begin in range(0, INPUTS, BK):
        if INPUTS % BK == 0:
            sums = tl.dot(tl.load(a), tl.load(b), sums, out_dtype=tl.int32)
        else:
            there = begin + k < INPUTS
            left, right = tl.load(a, mask=there[None, :], other=0), tl.load(b, mask=there[:, None], other=0)
            sums = tl.dot(left, right, sums, out_dtype=tl.int32)
        a += BK
        b += BK
    y = sums.to(tl.float32) * tl.load(steps + row, mask=row < count, other=0.0)[:, None]
    y *= tl.load(scales) if ONE else tl.load(scales + n, mask=n < outputs, other=0.0)[None, :]
    if bias is not None:
        y += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    where = out + row.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(where, narrow(y, out.dtype.element_ty, INTERPRETED), mask=(row < count)[:, None] & (n < outputs)[None, :])
