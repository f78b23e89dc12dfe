"""The Triton kernels themselves: one pass over the memory of one tensor, or of many in one launch. `cuda` calls them.

Groups up to a tile's width are held in registers between reading and writing; longer ones are read twice, the second time
from the cache. Constants of a grid come as a tuple, `plans.constants`.
"""

import triton
import triton.language as tl

from qkit_torchao.kernels.triton_arithmetic import (  # fmt: skip
    MAGIC,
    bits,
    extremes,
    floats,
    larger,
    load,
    narrow,
    place,
    signs_matter,
    small_code,
    small_value,
    smaller,
    steps,
    tensor_code,
    tile,
    units,
)

#: arguments of `one` that a program reads or writes one at a time
SMALL = ["scales", "zeros", "factors", "gate", "peak", "power", "broken"]


@triton.jit
def values_of_many(
    sources, targets, blocks, peaks, GRID: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    FULL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The quantized values of many weights; of those whose gate is off, the weights themselves.

    `blocks` int64 [programs, 5]: where a program's part of source and target begins, in elements from `sources` and `targets`
    on; the address of the gate (a byte); the tensor's number; and how many groups are left in it. `peaks`: bits of the largest
    magnitude of each tensor, for nvfp4.
    """
    TYPE: tl.constexpr = targets.dtype.element_ty
    NARROW: tl.constexpr = sources.dtype.element_ty.primitive_bitwidth == 16
    block = blocks + 5 * turn(GRID)
    source = place(sources, block, 0, sources.dtype.element_ty)
    target = place(targets, block, 1, TYPE)
    gate = tl.load(tl.load(block + 2).to(tl.pointer_type(tl.uint8)))
    offsets, mask = tile(tl.load(block + 4), GROUPS, GROUP, WIDTH, FULL)
    peak = 0
    if GRID[0] == "nvfp4":
        peak = tl.load(peaks + tl.load(block + 3))
    if GROUP <= WIDTH:
        x = load(source + offsets, mask)
        if gate != 0:
            high, low = extremes(x, GRID, INTERPRETED)
            s, reciprocal, z, _ = steps(high, low, peak, GRID, INTERPRETED)
            x = units(x, s, reciprocal, z, GRID, NARROW, INTERPRETED) * s[:, None]
        put(target + offsets, x, mask, TYPE, INTERPRETED)
    else:
        high, low = long_extremes(source, GRID, GROUP, WIDTH, INTERPRETED)
        s, reciprocal, z, _ = steps(high, low, peak, GRID, INTERPRETED)
        for begin in range(0, GROUP, WIDTH):
            inside = offsets < GROUP - begin
            x = load(source + begin + offsets, inside)
            if gate != 0:
                x = units(x, s, reciprocal, z, GRID, NARROW, INTERPRETED) * s[:, None]
            put(target + begin + offsets, x, inside, TYPE, INTERPRETED)


@triton.jit
def codes_of_many(
    sources, codes, blocks, GRID: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    FULL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The codes, a byte each, the scales and the steps of many weights on a symmetric grid without a scale of the tensor.

    `blocks` int64 [programs, 6]: where a program's part of source and codes begins, in elements from `sources` and `codes` on;
    the addresses of the tensor's scales and of its steps, float32; its count of groups; and how many of these are left.
    """
    NARROW: tl.constexpr = sources.dtype.element_ty.primitive_bitwidth == 16
    CODE: tl.constexpr = codes.dtype.element_ty
    block = blocks + 6 * tl.program_id(0)
    source = place(sources, block, 0, sources.dtype.element_ty)
    target = place(codes, block, 1, CODE)
    count, left = tl.load(block + 4), tl.load(block + 5)
    offsets, mask = tile(left, GROUPS, GROUP, WIDTH, FULL)
    if GROUP <= WIDTH:
        x = load(source + offsets, mask)
        high, low = extremes(x, GRID, INTERPRETED)
        s, reciprocal, z, stored = steps(high, low, 0, GRID, INTERPRETED)
        y = units(x, s, reciprocal, z, GRID, NARROW, INTERPRETED)
        tl.store(target + offsets, coded(x, y, z, GRID, "bytes").to(CODE), mask=mask)
    else:
        high, low = long_extremes(source, GRID, GROUP, WIDTH, INTERPRETED)
        s, reciprocal, z, stored = steps(high, low, 0, GRID, INTERPRETED)
        for begin in range(0, GROUP, WIDTH):
            inside = offsets < GROUP - begin
            x = load(source + begin + offsets, inside)
            y = units(x, s, reciprocal, z, GRID, NARROW, INTERPRETED)
            tl.store(target + begin + offsets, coded(x, y, z, GRID, "bytes").to(CODE), mask=inside)
    group = count - left + tl.arange(0, GROUPS)
    tl.store(tl.load(block + 3).to(tl.pointer_type(tl.float32)) + group, s, mask=group < count)
    if GRID[4] > 0:
        tl.store(tl.load(block + 2).to(tl.pointer_type(tl.uint8)) + group, stored.to(tl.uint8), mask=group < count)
    else:
        tl.store(tl.load(block + 2).to(tl.pointer_type(tl.float32)) + group, stored, mask=group < count)


@triton.jit
def turn(GRID: tl.constexpr):
    """Which part is this program's: the last comes first where all were just read for a peak, for it is still in the cache."""
    return tl.num_programs(0) - 1 - tl.program_id(0) if GRID[0] == "nvfp4" else tl.program_id(0)


@triton.jit
def long_extremes(source, GRID: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr):
    """`extremes` of one group that is longer than a tile."""
    offsets = tl.arange(0, WIDTH)[None, :]
    highest = tl.zeros([1, WIDTH], tl.float32)
    lowest = tl.zeros([1, WIDTH], tl.float32)
    for begin in range(0, GROUP, WIDTH):
        x = load(source + begin + offsets, offsets < GROUP - begin)
        if signs_matter(GRID):
            highest, lowest = larger(highest, x), smaller(lowest, x)
        else:
            highest = larger(highest, tl.abs(x))
    high, low = extremes(highest, GRID, INTERPRETED)
    if signs_matter(GRID):
        _, low = extremes(lowest, GRID, INTERPRETED)
    return high, low


@triton.jit
def put(address, x, mask, TYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Writes float32 `x` in `TYPE`."""
    tl.store(address, narrow(x, TYPE, INTERPRETED), mask=mask)


@triton.jit
def peaks_of_many(
    sources, blocks, peaks, GROUPS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Raises each of `peaks` to the bits of its tensor's largest magnitude. `blocks`: see `values_of_many`; a tile is one row."""
    block = blocks + 5 * tl.program_id(0)
    offsets = tl.arange(0, GROUPS * GROUP)
    source = place(sources, block, 0, sources.dtype.element_ty) + offsets
    x = load(source, None if FULL else offsets < tl.load(block + 4) * GROUP)
    if INTERPRETED:  # which leaves NaN out of a maximum
        most = tl.max(bits(x) & 0x7FFFFFFF, axis=0)
    else:
        most = bits(tl.reduce(tl.abs(x), 0, larger))
    peak = peaks + tl.load(block + 3)
    known = tl.load(peak, cache_modifier=".cg")  # not from this processor's own cache, which may be stale
    if most > known:  # seldom true after the first programs: atomic operations on one address wait for each other
        tl.atomic_max(peak, most)


@triton.jit(do_not_specialize=["number", "count"], do_not_specialize_on_alignment=SMALL)
def one(
    source, values, codes, scales, zeros, factors, gate, peak, power, broken, number, count, GRID: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, CODES: tl.constexpr, FULL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One tensor of `count` groups: its values, its codes and scales, its steps (`factors`), each where it has a tensor.

    `CODES`: a `layouts.Layout`, but for tiles. `gate`, a byte, if there is one: 0 has `source` itself for values. `peak`: the
    bits of the tensor's largest magnitude, for nvfp4, whose scale goes to `power`. `broken` is told of groups without codes,
    in its element `number`.
    """
    NARROW: tl.constexpr = source.dtype.element_ty.primitive_bitwidth == 16
    first = turn(GRID) * GROUPS
    start = first.to(tl.int64) * GROUP
    groups = first + tl.arange(0, GROUPS)
    offsets, mask = tile(count - first, GROUPS, GROUP, WIDTH, FULL)
    tensor_peak = 0
    if GRID[0] == "nvfp4":
        tensor_peak = tl.load(peak)
    if GROUP <= WIDTH:
        x = load(source + start + offsets, mask)
        high, low = extremes(x, GRID, INTERPRETED)
        s, reciprocal, z, stored = steps(high, low, tensor_peak, GRID, INTERPRETED)
        y = units(x, s, reciprocal, z, GRID, NARROW, INTERPRETED)
        if values is not None:
            v = chosen(gate, y * s[:, None], x)
            put(values + start + offsets, v, mask, values.dtype.element_ty, INTERPRETED)
        if codes is not None:
            if CODES != "pairs":
                tl.store(codes + start + offsets, coded(x, y, z, GRID, CODES).to(codes.dtype.element_ty), mask=mask)
            else:
                even, odd = tl.split(coded(x, y, z, GRID, CODES).reshape(GROUPS, WIDTH // 2, 2))
                halves, inside = tile(count - first, GROUPS, GROUP // 2, WIDTH // 2, FULL)
                tl.store(codes + start // 2 + halves, (even | (odd << 4)).to(tl.uint8), mask=inside)
    else:
        high, low = long_extremes(source + start, GRID, GROUP, WIDTH, INTERPRETED)
        s, reciprocal, z, stored = steps(high, low, tensor_peak, GRID, INTERPRETED)
        for begin in range(0, GROUP, WIDTH):
            inside = offsets < GROUP - begin
            x = load(source + start + begin + offsets, inside)
            y = units(x, s, reciprocal, z, GRID, NARROW, INTERPRETED)
            if values is not None:
                v = chosen(gate, y * s[:, None], x)
                put(values + start + begin + offsets, v, inside, values.dtype.element_ty, INTERPRETED)
            if codes is not None:
                c = coded(x, y, z, GRID, CODES).to(codes.dtype.element_ty)
                tl.store(codes + start + begin + offsets, c, mask=inside)
    if factors is not None:
        tl.store(factors + groups, s, mask=groups < count)
    if scales is not None:
        if GRID[0] == "nvfp4":
            stored = small_code(stored, stored, 3, -6, 8)
            if first == 0:
                tl.store(power, floats(tensor_code(tensor_peak, GRID) << 23))
        tl.store(scales + groups, stored.to(scales.dtype.element_ty), mask=groups < count)
        if GRID[0] == "minmax":
            stored = shifted(z.to(tl.int32), GRID, CODES)
            tl.store(zeros + groups, stored.to(zeros.dtype.element_ty), mask=groups < count)
    if broken is not None:
        tell(broken + number, high, low)


@triton.jit
def chosen(gate, on_grid, x):
    if gate is not None:
        on_grid = tl.where(tl.load(gate) != 0, on_grid, x)
    return on_grid


@triton.jit
def tell(broken, high, low):
    """Writes 1 at `broken` unless all groups with these extremes are between -2^127 and 2^127."""
    whole = (high < 2.0**127) & (low > -(2.0**127))
    if tl.min(whole.to(tl.int32), axis=0) == 0:
        tl.store(broken, 1)


@triton.jit
def coded(x, y, z, GRID: tl.constexpr, CODES: tl.constexpr):
    """The codes of `x`, which is `y` in units of its steps, as the last byte of int32."""
    if GRID[4] > 0:
        c = small_code(y, x, GRID[4], GRID[5], GRID[12])
    elif GRID[0] == "minmax":
        c = shifted(bits(y + z[:, None] + MAGIC), GRID, CODES)
    else:
        c = bits(y + MAGIC)
    return c


@triton.jit
def shifted(c, GRID: tl.constexpr, CODES: tl.constexpr):
    """Unsigned integers from -2^(bits - 1) on, where `CODES` are signed."""
    return c - (1 << (GRID[12] - 1)) if CODES == "signed" else c


@triton.jit
def decode(
    codes, scales, values, GRID: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The values of the codes of a row, a byte each, with its scale; a row for each program."""
    group = tl.program_id(0)
    for begin in range(0, GROUP, WIDTH):
        offsets = begin + tl.arange(0, WIDTH)
        where = group.to(tl.int64) * GROUP + offsets
        c = tl.load(codes + where, mask=offsets < GROUP, other=0).to(tl.int32)
        s = tl.load(scales + group)
        if GRID[4] > 0:
            x = small_value(c, GRID[4], GRID[5], GRID[12])
            s = floats(s.to(tl.int32) << 23)
        else:
            x = c.to(tl.float32)
        put(values + where, x * s, offsets < GROUP, values.dtype.element_ty, INTERPRETED)
