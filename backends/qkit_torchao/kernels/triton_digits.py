"""Device code of exact products of integers of 20 bits: on tensor cores for int8, digit by digit."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "columns"])
def subtract_product(
    out, left, right, units, sizes, more, rows, columns, out_stride, left_plane, left_stride, right_plane, right_stride,
    INPUTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] -= units [rows] * sizes [columns] * sums of left [rows, INPUTS] * right [columns, INPUTS] + more.

    Both sides are three planes of digits of 8 bits, the lowest first. Sums of products of two digits are int32; those of all fit
    into a double. Units and sizes are powers of two. `more` [rows, columns] lies in one piece, or is None. Programs go through
    bands of `BAND` tiles of rows.
    """
    tall, wide = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    band = tl.program_id(0) // (BAND * wide)
    height = min(tall - band * BAND, BAND)
    place = tl.program_id(0) % (BAND * wide)
    row = (band * BAND + place % height) * BM + tl.arange(0, BM)
    n = place // height * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a = left + (row % rows).to(tl.int64)[:, None] * left_stride + k[None, :]
    b = right + (n % columns).to(tl.int64)[None, :] * right_stride + k[:, None]
    s0 = tl.zeros([BM, BN], tl.int32)
    s1 = tl.zeros([BM, BN], tl.int32)
    s2 = tl.zeros([BM, BN], tl.int32)
    s3 = tl.zeros([BM, BN], tl.int32)
    s4 = tl.zeros([BM, BN], tl.int32)
    for begin in range(0, INPUTS, BK):
        if INPUTS % BK == 0:
            a0, a1, a2 = tl.load(a), tl.load(a + left_plane), tl.load(a + left_plane + left_plane)
            b0, b1, b2 = tl.load(b), tl.load(b + right_plane), tl.load(b + right_plane + right_plane)
        else:
            across, down = (begin + k < INPUTS)[None, :], (begin + k < INPUTS)[:, None]
            a0 = tl.load(a, mask=across, other=0)
            a1 = tl.load(a + left_plane, mask=across, other=0)
            a2 = tl.load(a + left_plane + left_plane, mask=across, other=0)
            b0 = tl.load(b, mask=down, other=0)
            b1 = tl.load(b + right_plane, mask=down, other=0)
            b2 = tl.load(b + right_plane + right_plane, mask=down, other=0)
        s0 = tl.dot(a0, b0, s0, out_dtype=tl.int32)
        s1 = tl.dot(a0, b1, s1, out_dtype=tl.int32)
        s1 = tl.dot(a1, b0, s1, out_dtype=tl.int32)
        s2 = tl.dot(a0, b2, s2, out_dtype=tl.int32)
        s2 = tl.dot(a1, b1, s2, out_dtype=tl.int32)
        s2 = tl.dot(a2, b0, s2, out_dtype=tl.int32)
        s3 = tl.dot(a1, b2, s3, out_dtype=tl.int32)
        s3 = tl.dot(a2, b1, s3, out_dtype=tl.int32)
        s4 = tl.dot(a2, b2, s4, out_dtype=tl.int32)
        a += BK
        b += BK
    y = s0.to(tl.float64) + s1.to(tl.float64) * 256.0 + s2.to(tl.float64) * 65536.0
    y = y + s3.to(tl.float64) * 16777216.0 + s4.to(tl.float64) * 4294967296.0
    there = row < rows
    y *= tl.load(units + row, mask=there, other=0.0)[:, None] * tl.load(sizes + n, mask=n < columns, other=0.0)[None, :]
    where = out + row.to(tl.int64)[:, None] * out_stride + n[None, :]
    inside = there[:, None] & (n < columns)[None, :]
    if more is not None:
        y += tl.load(more + row.to(tl.int64)[:, None] * columns + n[None, :], mask=inside, other=0.0)
    tl.store(where, tl.load(where, mask=inside, other=0.0) - y, mask=inside)
