"""The law: the codes, scales and values of every grid, in NumPy. Every backend mirrors this file function by function.

R0 to R13, here and elsewhere, are the laws of numerics.md, which says the same in words.

Arithmetic is fp32, one rounding per operation, in the order written. Tensors are grouped first, [..., n] -> [..., groups,
group]; scales and zero points are arrays [..., groups]. Callers of `quantize` check first that a tensor is finite.
`fake_quantize` does not: a group with a NaN or an infinity becomes NaN.
"""

from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qkit import element as constants
from qkit.element import STEP, Element
from qkit.grid import Grid, want_chosen
from qkit.qtensor import QTensor, dtype_of
from qkit.reference.read_scales import read_steps
from qkit.reference.scale_rules import (
    POWER_RULES,
    SYMMETRIC_RULES,
    Floats,
    amax,
    bits,
    ceil_exponent,
    poison,
    round_to_bfloat16,
)

Codes = NDArray[np.uint8]
DTYPE = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
FLOAT8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def quantize(w: NDArray[Any], grid: Grid, *, peak: float | None = None) -> QTensor[NDArray[Any]]:
    """Codes and scales of finite `w` [..., n], float32, bfloat16 or float16, on `grid`.

    Args:
        peak: `nvfp4` only: the largest magnitude of all tensors that share the tensor scale, `w` among them; see `qkit.fused`.
    """
    x = group(w, grid)
    dtype = dtype_of(w)
    if grid.scale == "minmax":
        s, z = asymmetric_scale(x, grid.element)
        q = asymmetric_codes(x, s, z, grid.element)
        return QTensor(q.astype(np.uint8).reshape(w.shape), s, grid, dtype, zeros=z.astype(np.uint8))
    if grid.element.kind == "integer":
        s = symmetric_scale(x, grid)
        return QTensor(symmetric_codes(x, s, grid.element).astype(np.int8).reshape(w.shape), s, grid, dtype)
    if grid.scale == "nvfp4":
        tensor_scale = tensor_power(x, peak)
        block = block_scale(x, tensor_scale)
        codes = e2m1_codes(x, e4m3_values(block) * tensor_scale)
        return QTensor(codes.reshape(w.shape), block, grid, dtype, tensor_scale=tensor_scale)
    c = scale_code(amax(x), grid)
    return QTensor(float_codes(x, c, grid.element).reshape(w.shape), c, grid, dtype)


def dequantize(q: QTensor[NDArray[Any]]) -> NDArray[Any]:
    """The values [..., n] of `q`, computed in fp32 and rounded once to `q.dtype`."""
    codes = q.codes.reshape(q.grid.group_shape(q.shape))
    values: Floats
    if q.zeros is not None:
        values = codes.astype(np.float32) - each(q.zeros.astype(np.float32))
    elif q.grid.element.kind == "integer":
        values = codes.astype(np.float32)
    else:
        values = float_values(codes, q.grid.element)
    with np.errstate(over="ignore", invalid="ignore"):
        values = values * each(scale_values(q))
        if q.biases is not None:  # the product is rounded before the sum
            values = values + each(q.biases.astype(np.float32))
    return to_dtype(values.reshape(q.shape), q.dtype)


def fake_quantize(
    w: NDArray[Any],
    grid: Grid,
    *,
    scales: Floats | None = None,
    zeros: Codes | None = None,
    peak: float | None = None,
) -> NDArray[Any]:
    """The values [..., n] that `w` would have after `dequantize(quantize(w, grid))`, bit for bit, in the type of `w`.

    Args:
        scales: fp32 steps, shaped like the grid's scales, instead of those that the grid's rule chooses (static
            quantization). Powers of two for floats; not for `nvfp4`. A NaN or an infinity then spoils only itself.
        zeros: the zero points that belong to `scales` under `minmax`.
        peak: as for `quantize`. All values are NaN where it is not finite.
    """
    x = group(w, grid)
    if scales is not None:
        return to_dtype(_static_values(x, grid, scales, zeros).reshape(w.shape), dtype_of(w))
    with np.errstate(over="ignore", invalid="ignore"):
        if grid.scale == "minmax":
            s, z = asymmetric_scale(x, grid.element)
            values = (asymmetric_codes(x, s, z, grid.element) - each(z)) * each(s)
        elif grid.element.kind == "integer":
            s = symmetric_scale(x, grid)
            values = symmetric_codes(x, s, grid.element) * each(s)
        elif grid.scale == "nvfp4":
            tensor_scale = tensor_power(x, peak) + poison(_peak(x, peak))
            s = e4m3_values(block_scale(x, tensor_scale)) * tensor_scale
            values = float_values(e2m1_codes(x, s), grid.element) * each(s)
        else:
            largest = amax(x)
            c = scale_code(largest, grid)
            values = float_values(float_codes(x, c, grid.element), grid.element) * each(power(c) + poison(largest))
    return to_dtype(values.reshape(w.shape), dtype_of(w))


def unclipped(
    w: NDArray[Any],
    grid: Grid,
    *,
    scales: Floats | None = None,
    zeros: Codes | None = None,
    peak: float | None = None,
) -> NDArray[np.bool_]:
    """Where `w` [..., n] rounds to a code without being clipped: the gradient mask of `ste = "masked"`.

    Integers: the rounded quotient, zero point added, is a code. Floats: the magnitude is at most the largest value's.
    `scales`, `zeros` and `peak` as for `fake_quantize`.
    """
    x = group(w, grid)
    with np.errstate(over="ignore", invalid="ignore"):
        step, z = _steps(x, grid, peak) if scales is None else (scales, zeros)
        if grid.element.kind == "float":
            inside = np.abs(x) <= each(np.float32(grid.element.largest) * step)
        elif z is None:
            q = np.rint(x / each(step))
            inside = (q >= grid.element.lowest) & (q <= grid.element.highest)
        else:
            q = np.rint(x / each(step)) + each(z.astype(np.float32))
            inside = (q >= 0) & (q <= grid.element.levels)
    return cast(NDArray[np.bool_], inside.reshape(w.shape))


def scale_values(q: QTensor[NDArray[Any]]) -> Floats:
    """The fp32 step of every group [..., groups]: the factor of its codes."""
    if q.grid.read:
        return read_steps(q)
    if q.tensor_scale is not None:
        return cast(Floats, e4m3_values(q.scales) * q.tensor_scale)
    return power(q.scales) if q.grid.element.kind == "float" else q.scales


def _static_values(x: Floats, grid: Grid, s: Floats, zeros: Codes | None) -> Floats:
    """The values of grouped `x` on given fp32 steps; NaN where `x` is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        if zeros is not None:
            z = zeros.astype(np.float32)
            values = (asymmetric_codes(x, s, z, grid.element) - each(z)) * each(s)
        elif grid.element.kind == "integer":
            values = symmetric_codes(x, s, grid.element) * each(s)
        else:
            values = float_values(float_codes(x, exponent(s), grid.element), grid.element) * each(s)
        return cast(Floats, values + poison(x))


def _steps(x: Floats, grid: Grid, peak: float | None) -> tuple[Floats, Floats | None]:
    """The fp32 step of every group of `x`, and its zero point under `minmax`."""
    if grid.scale == "minmax":
        return asymmetric_scale(x, grid.element)
    if grid.element.kind == "integer":
        return symmetric_scale(x, grid), None
    if grid.scale == "nvfp4":
        tensor_scale = tensor_power(x, peak)
        return cast(Floats, e4m3_values(block_scale(x, tensor_scale)) * tensor_scale), None
    return power(scale_code(amax(x), grid)), None


# Shapes and types


def group(w: NDArray[Any], grid: Grid) -> Floats:
    """[..., n] -> float32 [..., groups, group]."""
    want_chosen(grid)
    return w.astype(np.float32).reshape(grid.group_shape(w.shape))


def each(per_group: Floats) -> Floats:
    """[..., groups] -> [..., groups, 1]: one value for each group, which broadcasts over the group's elements."""
    return per_group[..., None]


def to_dtype(x: Floats, dtype: str) -> NDArray[Any]:
    """`x` rounded once, to nearest even."""
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(DTYPE[dtype])


# Integer scales (R3, R5)


def symmetric_scale(x: Floats, grid: Grid) -> Floats:
    """The scale of each group under a symmetric rule, on the bfloat16 grid, at least 2^-96 in magnitude."""
    return SYMMETRIC_RULES[grid.scale](x, grid.element)


def symmetric_codes(x: Floats, s: Floats, element: Element) -> Floats:
    """Codes -2^(bits-1) .. 2^(bits-1)-1 as floats: x/s to nearest even. Division is exact enough since s has 8 bits."""
    return cast(Floats, np.clip(np.rint(x / each(s)), element.lowest, element.highest))


def asymmetric_scale(x: Floats, element: Element) -> tuple[Floats, Floats]:
    """Scale and zero point 0 .. 2^bits-1 (a float) of each group under `minmax`; zero is always representable."""
    low = np.minimum(x.min(axis=-1), np.float32(0))
    high = np.maximum(x.max(axis=-1), np.float32(0))
    s = round_to_bfloat16((high - low) * np.float32(STEP[element.name, "minmax"]))
    s = np.maximum(s, np.float32(constants.MIN_SCALE)) + poison(high - low)
    return s, np.clip(np.rint(-low / s), 0, element.levels)


def asymmetric_codes(x: Floats, s: Floats, z: Floats, element: Element) -> Floats:
    """Codes 0 .. 2^bits-1 as floats."""
    return cast(Floats, np.clip(np.rint(x / each(s)) + each(z), 0, element.levels))


# Power-of-two scales (R6)


def scale_code(peak: Floats, grid: Grid) -> Codes:
    """E8M0 codes of groups whose largest magnitude is `peak`; code c means 2^(c-127)."""
    c = POWER_RULES[grid.scale](peak, grid.element)
    return cast(Codes, np.clip(c, constants.MIN_SCALE_CODE, constants.MAX_SCALE_CODE).astype(np.uint8))


def exponent(s: Floats) -> Codes:
    """The inverse of `power`."""
    return (bits(s) >> 23).astype(np.uint8)


def power(c: NDArray[Any]) -> Floats:
    """2^(c-127) for codes 1 .. 254."""
    return (c.astype(np.int32) << 23).view(np.float32)


# Small floats (R7, R8)


def float_codes(x: Floats, c: Codes, element: Element) -> Codes:
    """The bits of each of `x` as an `element` under the E8M0 codes `c` of its group."""
    if element.name == "e2m1":
        return e2m1_codes(x, power(c))
    down = power(np.int32(2 * 127) - c)
    y = np.clip(x * each(down), -element.largest, element.largest).astype(np.float32)
    return cast(Codes, y.astype(FLOAT8[element.name]).view(np.uint8))


def float_values(codes: Codes, element: Element) -> Floats:
    """The values of the bits of small floats, as float32."""
    if element.name == "e2m1":
        return np.array(constants.E2M1_VALUES, np.float32)[codes]
    return cast(Floats, codes.view(FLOAT8[element.name]).astype(np.float32))


def e2m1_codes(x: Floats, s: Floats) -> Codes:
    """Four-bit codes: how many boundaries lie below abs(x)/s, ties to even, saturating; the sign is the high bit."""
    a = np.abs(x)
    codes = np.signbit(x).astype(np.uint8) << np.uint8(3)
    for boundary, included in constants.E2M1_BOUNDARIES:
        edge = each(np.float32(boundary) * s)
        codes += a >= edge if included else a > edge
    return codes


# NVFP4 (R9)


def tensor_power(x: Floats, peak: float | None = None) -> Floats:
    """The power of two, shape (), over all block scales of a tensor: its largest magnitude over 6 * 448, rounded up.

    `peak` stands for the largest magnitude of all tensors that share it.
    """
    c = ceil_exponent(_peak(x, peak) * np.float32(constants.NVFP4_STEP))
    return np.asarray(power(np.clip(c, constants.MIN_SCALE_CODE, constants.MAX_SCALE_CODE)))  # an array, not a scalar


def _peak(x: Floats, peak: float | None) -> Floats:
    return cast(Floats, np.abs(x).max()) if peak is None else np.asarray(peak, np.float32)


def block_scale(x: Floats, tensor_scale: Floats) -> Codes:
    """The e4m3 bits of each block's scale; never zero, since a scale of zero would lose the values of its block."""
    s = amax(x) * (np.float32(1) / tensor_scale) * np.float32(STEP["e2m1", "nvfp4"])
    return cast(Codes, np.clip(s, constants.MIN_BLOCK_SCALE, 448.0).astype(FLOAT8["e4m3"]).view(np.uint8))


def e4m3_values(codes: Codes) -> Floats:
    """The values of the bits of e4m3 numbers, as float32."""
    return cast(Floats, codes.view(FLOAT8["e4m3"]).astype(np.float32))
