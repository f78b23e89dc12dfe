"""The merged weight in one pass: the base, spread within its cells where it is codes, plus the product of two shortened factors.

Products are exact, and sums run from the first column of B to the last, as in `arithmetic.merged`. `cuda_merge` calls it.
"""

import triton
import triton.language as tl

from qkit_torchao.kernels.triton_arithmetic import nearest

ROW, COLUMN = tl.constexpr(0xC13FA9A9 - (1 << 32)), tl.constexpr(0x91E10DA5 - (1 << 32))  #: `reference.merged.DITHER`


@triton.jit
def added(
    w, scales, b, a, out, outputs, INPUTS: tl.constexpr, RANK: tl.constexpr, GROUP: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """w [outputs, INPUTS] + B A -> float32. Where there are `scales` [outputs, INPUTS / GROUP], `w` is spread first.

    Args:
        b, a: float32 [outputs, RANK] and [RANK, INPUTS].
    """
    across: tl.constexpr = (INPUTS + BC - 1) // BC
    n = tl.program_id(0) // across * BR + tl.arange(0, BR)
    k = tl.program_id(0) % across * BC + tl.arange(0, BC)
    there = (n[:, None] < outputs) & (k[None, :] < INPUTS)
    where = n[:, None].to(tl.int64) * INPUTS + k[None, :]
    x = tl.load(w + where, mask=there, other=0.0).to(tl.float32)
    if scales is not None:
        PARTS: tl.constexpr = BC // GROUP
        g = tl.program_id(0) % across * PARTS + tl.arange(0, PARTS)
        known = (n[:, None] < outputs) & (g[None, :] < INPUTS // GROUP)
        s = tl.load(scales + n[:, None].to(tl.int64) * (INPUTS // GROUP) + g[None, :], mask=known, other=1.0)
        s = s.to(tl.float32)[:, :, None]
        v = nearest(tl.reshape(x, (BR, PARTS, GROUP)) / s)  # a code, whatever the last bit of the quotient
        level = ((n[:, None] * ROW + k[None, :] * COLUMN) >> 24) & 0xFF
        d = tl.reshape((level.to(tl.float32) * 2.0 - 255.0) * 0.001953125, (BR, PARTS, GROUP))
        top = tl.max(tl.abs(v), axis=2)[:, :, None]
        x = tl.reshape(tl.where(tl.abs(v) == top, v, v + d) * s, (BR, BC))
    total = (
        tl.load(b + n * RANK, mask=n < outputs, other=0.0)[:, None]
        * tl.load(a + k, mask=k < INPUTS, other=0.0)[None, :]
    )
    for r in range(1, RANK):
        left = tl.load(b + n * RANK + r, mask=n < outputs, other=0.0)
        right = tl.load(a + r * INPUTS + k, mask=k < INPUTS, other=0.0)
        total = total + left[:, None] * right[None, :]
    tl.store(out + where, x + total, mask=there)
