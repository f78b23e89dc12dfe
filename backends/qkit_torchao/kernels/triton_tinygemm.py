"""int4 as tinygemm multiplies it, in one pass over the weight. Device code; `cuda` calls it.

The layout is that of `torch.ops.aten._convert_weight_to_int4pack` with 8 inner k-tiles, as PyTorch's `int4mm.cu` describes it: a
word for each lane of a warp, 4 words a lane for 8 rows and 128 columns. Lane t has row t / 4; its word i has the columns
32 i + 16 j + 8 h + 2 (t mod 4) + e, codes from 0 to 15, at bit 16 e + 8 j + 4 h.
"""

import triton
import triton.language as tl

from qkit_torchao.kernels.triton_arithmetic import bits, extremes, lifted, steps
from qkit_torchao.kernels.triton_passes import tell


def wrapped(word: int) -> int:
    """The int32 with the last 32 bits of `word`."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)


OUTER_LOW, INNER_LOW = tl.constexpr(0x00FF00FF), tl.constexpr(0x0F0F0F0F)
#: Pairs of element and scale rule that the kernel computes.
TAKES = frozenset({("int4", "signed"), ("int4", "absmax"), ("int4", "midmax")})
WIDTH = 256  #: columns of 8 rows that a program takes
WARPS = 1

#: turns a sum of eight codes, each in the last bits of `MAGIC` and at its place, into 32 bits of codes from 0 on: an 8 for each
#: code, less the bits of `MAGIC` below bit 32
EIGHTS = tl.constexpr(wrapped(0x88888888 - sum(0x4B400000 << place for place in (0, 4, 8, 12, 16, 20, 24, 28))))


@triton.jit(do_not_specialize=["number", "rows", "columns"], do_not_specialize_on_alignment=["broken"])
def quantize(
    source, codes, scales, broken, number, rows, columns, GRID: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Codes and steps of `source` [rows, columns]; `scales` int32 [groups, rows] is bfloat16, a step and a zero in each.

    `columns` are a multiple of `WIDTH`, which is one of `GROUP` and of 128; `rows` one of 8. `broken`: see `passes.one`.
    """
    across = columns // WIDTH
    first_row = tl.program_id(0) // across * 8
    first_column = tl.program_id(0) % across * WIDTH
    r = tl.arange(0, 8)[:, None]
    columns = columns // WIDTH * WIDTH  # as the compiler is shown
    x = tl.load(source + (first_row + r).to(tl.int64) * columns + first_column + tl.arange(0, WIDTH)[None, :])
    x = x.to(tl.float32).reshape(8 * WIDTH // GROUP, GROUP)
    high, low = extremes(x, GRID, INTERPRETED)
    s, reciprocal, z, _ = steps(high, low, 0, GRID, INTERPRETED)
    signed = bits(lifted(x, s, reciprocal, z, GRID, True, INTERPRETED))
    even, odd = tl.split(signed.reshape(8 * WIDTH // 8, 4, 2))
    mine = tl.sum((even + (odd << 16)) << (tl.arange(0, 4) * 4)[None, :], axis=1) + EIGHTS
    lanes = turned(mine.reshape(8 * WIDTH // 32, 2, 2)).reshape(8, WIDTH // 128, 4, 4).permute(1, 0, 3, 2)
    target = codes + (first_row.to(tl.int64) * columns + first_column * 8) // 8
    tl.store(target + tl.arange(0, 8 * WIDTH // 8), lanes.reshape(8 * WIDTH // 8))
    g = tl.arange(0, WIDTH // GROUP)[None, :]
    stored = (bits(s) >> 16 & 0xFFFF).reshape(8, WIDTH // GROUP)
    tl.store(scales + (first_column // GROUP + g).to(tl.int64) * rows + first_row + r, stored)
    tell(broken + number, high, low)


@triton.jit
def turned(words):
    """Words [n, 2, 2] of 8 columns each, number t of a half at bit 4 t -> words [n, 4] of columns t, from word q at bit 4 q."""
    even, odd = tl.split(words)
    a, c = tl.split(even.reshape(even.shape[0], 2))
    b, d = tl.split(odd.reshape(odd.shape[0], 2))
    ac, bd = a & OUTER_LOW | (c & OUTER_LOW) << 8, b & OUTER_LOW | (d & OUTER_LOW) << 8
    ca, db = a >> 8 & OUTER_LOW | c & ~OUTER_LOW, b >> 8 & OUTER_LOW | d & ~OUTER_LOW
    first, second = ac & INNER_LOW | (bd & INNER_LOW) << 4, ac >> 4 & INNER_LOW | bd & ~INNER_LOW
    third, fourth = ca & INNER_LOW | (db & INNER_LOW) << 4, ca >> 4 & INNER_LOW | db & ~INNER_LOW
    return tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(words.shape[0], 4)
