"""Steps of AdamW (Loshchilov and Hutter, 2019) in Triton, and the values of the stepped weights. `cuda_adamw` calls them."""

import triton
import triton.language as tl

from qkit_torchao.kernels.triton_arithmetic import extremes, load, narrow, place, steps, tile, units


@triton.jit
def adamw_of_many(
    weights, gradients, means, squares, targets, table, blocks, scalars, GRID: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A step of AdamW for many weights in one launch, and the quantized values of the stepped weights, if there is a `GRID`.

    Arithmetic is in float32 and rounded once to the type of the weight, whose stored value is then quantized. `table` int64
    [tensors, 6]: where weight, gradient, both moments and target are, in elements from the first of each on; the address of
    the gate. `blocks` int64 [programs, 3]: a tensor, the first element of the program's part, how many groups are left.
    `scalars` float32 [6]: see `adamw_scalars`.
    """
    SOURCE: tl.constexpr = weights.dtype.element_ty
    NARROW: tl.constexpr = SOURCE.primitive_bitwidth == 16
    MOMENT: tl.constexpr = means.dtype.element_ty
    block = blocks + 3 * tl.program_id(0)
    row = table + 6 * tl.load(block)
    start = (tl.load(block + 1) >> 3) << 3
    weight = place(weights, row, 0, SOURCE) + start
    gradient = place(gradients, row, 1, gradients.dtype.element_ty) + start
    mean = place(means, row, 2, MOMENT) + start
    square = place(squares, row, 3, MOMENT) + start
    offsets, mask = tile(tl.load(block + 2), GROUPS, GROUP, WIDTH, FULL)
    w = load(weight + offsets, mask)
    g = load(gradient + offsets, mask)
    m = load(mean + offsets, mask)
    v = load(square + offsets, mask)
    m += tl.load(scalars) * (g - m)
    v += tl.load(scalars + 1) * (g * g - v)
    root = tl.sqrt(v) * tl.load(scalars + 4) + tl.load(scalars + 5)
    stepped = narrow(w * tl.load(scalars + 2) - tl.load(scalars + 3) * m / root, SOURCE, INTERPRETED)
    tl.store(weight + offsets, stepped, mask=mask)
    tl.store(mean + offsets, narrow(m, MOMENT, INTERPRETED), mask=mask)
    tl.store(square + offsets, narrow(v, MOMENT, INTERPRETED), mask=mask)
    if GRID is not None:
        TARGET: tl.constexpr = targets.dtype.element_ty
        target = place(targets, row, 4, TARGET) + start
        x = stepped.to(tl.float32)
        if tl.load(tl.load(row + 5).to(tl.pointer_type(tl.uint8))) != 0:
            high, low = extremes(x, GRID, INTERPRETED)
            s, reciprocal, z, _ = steps(high, low, 0, GRID, INTERPRETED)
            x = units(x, s, reciprocal, z, GRID, NARROW, INTERPRETED) * s[:, None]
        tl.store(target + offsets, narrow(x, TARGET, INTERPRETED), mask=mask)


@triton.jit
def adamw_scalars(
    step, rate, scalars, complement1, complement2, log1, log2, eps, decay, FLOAT: tl.constexpr
):  # fmt: skip
    """Counts a step, and writes the factors of `adamw_of_many`, float32 [6].

    They are 1 - beta1, 1 - beta2, 1 - rate * decay, rate / (1 - beta1^step), 1 / sqrt(1 - beta2^step) and eps.
    `rate` is a number or the address of one; logarithms of the betas are to base 2.
    """
    count = tl.load(step) + 1.0
    tl.store(step, count)
    lr = tl.full((), rate if FLOAT else tl.load(rate), tl.float64)
    correction1 = 1.0 - tl.exp2(count.to(tl.float64) * log1)
    correction2 = 1.0 - tl.exp2(count.to(tl.float64) * log2)
    tl.store(scalars, complement1)
    tl.store(scalars + 1, complement2)
    tl.store(scalars + 2, (1.0 - lr * decay).to(tl.float32))
    tl.store(scalars + 3, (lr / correction1).to(tl.float32))
    tl.store(scalars + 4, (1.0 / tl.sqrt(correction2)).to(tl.float32))
    tl.store(scalars + 5, eps)
