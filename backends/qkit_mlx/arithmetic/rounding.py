"""`qkit/reference/rounding.py` in MLX, function by function, bit for bit; arrays only. R0 to R13 are the laws of numerics.md.

Integer operations and powers of two encode small floats: MLX has no e5m2, and its own quantizers differ between devices.
"""

import mlx.core as mx

from qkit import element as constants
from qkit.element import ELEMENTS, STEP, Element
from qkit.grid import Grid, want_chosen
from qkit.qtensor import QTensor, dtype_of
from qkit.reference import rounding as law
from qkit_mlx.arithmetic.read_scales import read_steps
from qkit_mlx.arithmetic.scale_rules import (
    POWER_RULES,
    SYMMETRIC_RULES,
    amax,
    bits,
    ceil_exponent,
    computed_by_law,
    poison,
    round_to_bfloat16,
)
from qkit_mlx.arithmetic.small_floats import ceil_scale, round_to_element

DTYPE = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def quantize(w: mx.array, grid: Grid, *, peak: mx.array | None = None) -> QTensor[mx.array]:
    """Codes and scales of finite `w` [..., n], float32, bfloat16 or float16, on `grid`."""
    dtype = dtype_of(w)
    x = group(w, grid)
    if grid.scale == "minmax":
        s, z = asymmetric_scale(x.min(axis=-1), x.max(axis=-1), grid.element)
        q = asymmetric_codes(x, each(s), each(z), grid.element)
        return QTensor(q.astype(mx.uint8).reshape(w.shape), s, grid, dtype, zeros=z.astype(mx.uint8))
    if grid.element.kind == "integer":
        s = symmetric_scale(x, grid)
        return QTensor(symmetric_codes(x, each(s), grid.element).astype(mx.int8).reshape(w.shape), s, grid, dtype)
    if grid.scale == "nvfp4":
        tensor_scale = tensor_power(x, peak)
        block = block_scale(x, tensor_scale)
        codes = e2m1_codes(x, e4m3_values(block) * tensor_scale)
        return QTensor(codes.reshape(w.shape), block, grid, dtype, tensor_scale=tensor_scale)
    c = scale_code(amax(x), grid).astype(mx.uint8)
    return QTensor(float_codes(x, c, grid.element).reshape(w.shape), c, grid, dtype)


def dequantize(q: QTensor[mx.array]) -> mx.array:
    """The values [..., n] of `q`, computed in fp32 and rounded once to `q.dtype`."""
    codes = q.codes.reshape(q.grid.group_shape(q.shape))
    if q.zeros is not None:
        values = codes.astype(mx.float32) - each(q.zeros.astype(mx.float32))
    elif q.grid.element.kind == "integer":
        values = codes.astype(mx.float32)
    else:
        values = float_values(codes, q.grid.element)
    values = values * each(scale_values(q))
    if q.biases is not None:  # the product is rounded before the sum
        values = values + each(q.biases.astype(mx.float32))
    return to_dtype(values.reshape(q.shape), q.dtype)


def fake_quantize(
    w: mx.array,
    grid: Grid,
    *,
    scales: mx.array | None = None,
    zeros: mx.array | None = None,
    peak: mx.array | None = None,
) -> mx.array:
    """The values [..., n] that `w` would have after `dequantize(quantize(w, grid))`, bit for bit, in the type of `w`.

    Has no gradient of its own: see `layers.straight_through`.

    Args:
        scales: fp32 steps, shaped like the grid's scales, instead of those that the grid's rule chooses (static
            quantization). A NaN or an infinity then spoils only itself.
        zeros: the zero points that belong to `scales` under `minmax`.
        peak: float32 [], `nvfp4` only: the largest magnitude of all tensors that share the tensor scale.
    """
    x = group(w, grid)
    if scales is not None:
        return to_dtype(_static_values(x, grid, scales, zeros).reshape(w.shape), dtype_of(w))
    if grid.scale == "minmax":
        s, z = asymmetric_scale(x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True), grid.element)
        values = (asymmetric_codes(x, s, z, grid.element) - z) * s
    elif grid.element.kind == "integer":
        s = each(symmetric_scale(x, grid))
        values = symmetric_codes(x, s, grid.element) * s
    elif grid.scale == "nvfp4":
        tensor_scale = tensor_power(x, peak) + poison(mx.abs(x).max() if peak is None else peak)
        s = each(e4m3_values(block_scale(x, tensor_scale)) * tensor_scale)
        y = mx.clip(x / s, -grid.element.largest, grid.element.largest)
        values = round_to_element(y, grid.element, step=1.0) * s
    elif grid.scale == "rceil":  # clips nothing
        values = round_to_element(x, grid.element, step=ceil_scale(mx.abs(x).max(axis=-1, keepdims=True), grid.element))
    else:
        s = each(power(scale_code(peak := amax(x), grid)) + poison(peak))
        values = round_to_element(mx.clip(x, -grid.element.largest * s, grid.element.largest * s), grid.element, step=s)
    return to_dtype(values.reshape(w.shape), dtype_of(w))


def unclipped(
    w: mx.array,
    grid: Grid,
    *,
    scales: mx.array | None = None,
    zeros: mx.array | None = None,
    peak: mx.array | None = None,
) -> mx.array:
    """Where `w` [..., n] rounds to a code without being clipped. `scales`, `zeros` and `peak`: see `fake_quantize`."""
    x = group(w, grid)
    step, z = _steps(x, grid, peak) if scales is None else (scales, zeros)
    if grid.element.kind == "float":
        return (mx.abs(x) <= each(grid.element.largest * step)).reshape(w.shape)
    q, lowest = mx.round(x / each(step)), grid.element.lowest
    if z is not None:
        q, lowest = q + each(z.astype(mx.float32)), 0
    return ((q >= lowest) & (q <= lowest + grid.element.levels)).reshape(w.shape)


def masked(gradient: mx.array, inside: mx.array) -> mx.array:
    """`gradient` where `inside`, else zero: the gradient under `ste = "masked"`, where `inside` is what `unclipped` returns."""
    return mx.where(inside, gradient, 0)


def scale_values(q: QTensor[mx.array]) -> mx.array:
    """The fp32 step of every group [..., groups]: the factor of its codes."""
    if q.grid.read:
        return read_steps(q, e4m3_values)
    if q.tensor_scale is not None:
        return e4m3_values(q.scales) * q.tensor_scale
    return power(q.scales) if q.grid.element.kind == "float" else q.scales


def _static_values(x: mx.array, grid: Grid, s: mx.array, zeros: mx.array | None) -> mx.array:
    """The values of grouped `x` on given fp32 steps; NaN where `x` is not finite."""
    if zeros is not None:
        z = each(zeros.astype(mx.float32))
        values = (asymmetric_codes(x, each(s), z, grid.element) - z) * each(s)
    elif grid.element.kind == "integer":
        values = symmetric_codes(x, each(s), grid.element) * each(s)
    else:
        values = float_values(float_codes(x, exponent(s), grid.element), grid.element) * each(s)
    return values + poison(x)


def _steps(x: mx.array, grid: Grid, peak: mx.array | None) -> tuple[mx.array, mx.array | None]:
    """The fp32 step of every group of `x`, and its zero point under `minmax`."""
    if grid.scale == "minmax":
        return asymmetric_scale(x.min(axis=-1), x.max(axis=-1), grid.element)
    if grid.element.kind == "integer":
        return symmetric_scale(x, grid), None
    if grid.scale == "nvfp4":
        tensor_scale = tensor_power(x, peak)
        return e4m3_values(block_scale(x, tensor_scale)) * tensor_scale, None
    return power(scale_code(amax(x), grid)), None


# Shapes and types


def group(w: mx.array, grid: Grid) -> mx.array:
    """[..., n] -> float32 [..., groups, group]."""
    want_chosen(grid)
    return w.astype(mx.float32).reshape(grid.group_shape(tuple(w.shape)))


def each(per_group: mx.array) -> mx.array:
    """[..., groups] -> [..., groups, 1]: one value for each group, which broadcasts over the group's elements."""
    return per_group[..., None]


def to_dtype(x: mx.array, dtype: str) -> mx.array:
    """`x` rounded once, to nearest even."""
    return x.astype(DTYPE[dtype])


# Integer scales (R3, R5)


def symmetric_scale(x: mx.array, grid: Grid) -> mx.array:
    """The scale of each group under a symmetric rule, on the bfloat16 grid, at least 2^-96 in magnitude."""
    rule = SYMMETRIC_RULES.get(grid.scale)
    return rule(x, grid.element) if rule else computed_by_law(law.symmetric_scale, x, grid)


def symmetric_codes(x: mx.array, s: mx.array, element: Element) -> mx.array:
    """Codes -2^(bits-1) .. 2^(bits-1)-1 as floats: x/s to nearest even; `s` as `each` returns it. Exact since s has 8 bits."""
    return mx.clip(mx.round(x / s), element.lowest, element.highest)


def asymmetric_scale(low: mx.array, high: mx.array, element: Element) -> tuple[mx.array, mx.array]:
    """Scale and zero point 0 .. 2^bits-1 (a float) under `minmax` of groups from `low` to `high`. The number 0 has a code."""
    low, high = mx.minimum(low, 0.0), mx.maximum(high, 0.0)
    s = round_to_bfloat16((span := high - low) * STEP[element.name, "minmax"])
    s = mx.maximum(s, constants.MIN_SCALE) + poison(span)
    return s, mx.minimum(mx.round(-low / s), element.levels)


def asymmetric_codes(x: mx.array, s: mx.array, z: mx.array, element: Element) -> mx.array:
    """Codes 0 .. 2^bits-1 as floats; scales and zero points as `each` returns them."""
    return mx.clip(mx.round(x / s) + z, 0, element.levels)


# Power-of-two scales (R6)


def scale_code(peak: mx.array, grid: Grid) -> mx.array:
    """E8M0 codes (int32) of groups whose largest magnitude is `peak`; code c means 2^(c-127)."""
    rule = POWER_RULES.get(grid.scale)
    if rule is None:
        return computed_by_law(law.scale_code, peak, grid).astype(mx.int32)
    return mx.clip(rule(peak, grid.element), constants.MIN_SCALE_CODE, constants.MAX_SCALE_CODE)


def exponent(s: mx.array) -> mx.array:
    """The inverse of `power`."""
    return (bits(s) >> 23).astype(mx.uint8)


def power(c: mx.array) -> mx.array:
    """2^(c-127) for codes 1 .. 254."""
    return (c.astype(mx.int32) << 23).view(mx.float32)


# Small floats (R7, R8)


def float_codes(x: mx.array, c: mx.array, element: Element) -> mx.array:
    """The bits of each of `x` as an `element` under the E8M0 codes `c` of its group."""
    if element.name == "e2m1":
        return e2m1_codes(x, power(c))
    down = power(2 * 127 - c.astype(mx.int32))
    y = mx.clip(x * each(down), -element.largest, element.largest)
    return encode_float8(y, element)


def float_values(codes: mx.array, element: Element) -> mx.array:
    """The values of the bits of small floats, as float32: exact products of significands and powers of two."""
    u = codes.astype(mx.int32)
    exponent = (u >> element.mantissa) & ((1 << (element.bits - 1 - element.mantissa)) - 1)
    implicit = (exponent > 0).astype(mx.int32)  # 0 for subnormals, whose exponent is that of the smallest normal
    significand = (u & ((1 << element.mantissa) - 1)) + (implicit << element.mantissa)
    quantum = power(exponent - implicit + (127 + element.min_exponent - element.mantissa))
    sign = (u >> (element.bits - 1)) << 31
    return (bits(significand.astype(mx.float32) * quantum) | sign).view(mx.float32)


def e2m1_codes(x: mx.array, s: mx.array) -> mx.array:
    """Four-bit codes: how many boundaries lie below abs(x)/s, ties to even, saturating; the sign is the high bit."""
    a = mx.abs(x)
    codes = ((bits(x) >> 31) & 1) << 3
    for boundary, included in constants.E2M1_BOUNDARIES:
        edge = each(boundary * s)
        codes = codes + (a >= edge if included else a > edge).astype(mx.int32)
    return codes.astype(mx.uint8)


def encode_float8(y: mx.array, element: Element) -> mx.array:
    """The bits of clipped `y` as an 8-bit `element`, ties to even: the cast of `ml_dtypes`, which MLX lacks."""
    u = bits(y)  # neighbours are a power of two apart; rounding up also carries into the exponent
    exponent = mx.maximum(((u >> 23) & 0xFF) - 127, element.min_exponent)
    significand = mx.round(mx.abs(y) * power(127 + element.mantissa - exponent)).astype(mx.int32)
    sign = ((u >> 31) & 1) << 7
    return (significand + ((exponent - element.min_exponent) << element.mantissa) + sign).astype(mx.uint8)


# NVFP4 (R9)


def tensor_power(x: mx.array, peak: mx.array | None = None) -> mx.array:
    """The power of two, shape (), over all block scales of a tensor: its largest magnitude over 6 * 448, rounded up.

    `peak`, float32 [], stands for the largest magnitude of all tensors that share it.
    """
    c = ceil_exponent((mx.abs(x).max() if peak is None else peak) * constants.NVFP4_STEP)
    return power(mx.clip(c, constants.MIN_SCALE_CODE, constants.MAX_SCALE_CODE))


def block_scale(x: mx.array, tensor_scale: mx.array) -> mx.array:
    """The e4m3 bits of each block's scale; never zero, since a scale of zero would lose the values of its block."""
    s = amax(x) * (1.0 / tensor_scale) * STEP["e2m1", "nvfp4"]
    return encode_float8(mx.clip(s, constants.MIN_BLOCK_SCALE, 448.0), ELEMENTS["e4m3"])


def e4m3_values(codes: mx.array) -> mx.array:
    """The values of the bits of e4m3 numbers, as float32."""
    return float_values(codes, ELEMENTS["e4m3"])
