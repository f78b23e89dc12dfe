"""The law of rounding (`qkit.reference.rounding`) in torch, function by function; arrays only. R0 to R13 are in numerics.md.

Exact in eager mode and under torch.compile, on CPU and CUDA. Eager mode divides, which IEEE makes exact. Compiled code may
approximate `/`: there exact products correct it (`quotient`). CUDA turns divisions by constants into products: so do we.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qkit import element as constants
from qkit.element import STEP, Element
from qkit.grid import Grid, want_chosen
from qkit.qtensor import QTensor, dtype_of
from qkit_torchao.arithmetic.read_scales import alone, read_steps
from qkit_torchao.arithmetic.scale_rules import (
    POWER_RULES,
    SYMMETRIC_RULES,
    amax,
    bits,
    ceil_exponent,
    computed_by_law,
    poison,
    round_to_bfloat16,
)

DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def quantize(w: Tensor, grid: Grid, *, peak: Tensor | None = None) -> QTensor[Tensor]:
    """Codes and scales of finite `w` [..., n], float32, bfloat16 or float16, on `grid`."""
    x, dtype = group(w.detach(), grid), dtype_of(w)
    if grid.scale == "minmax":
        s, z = asymmetric_scale(x, grid.element)
        q = asymmetric_codes(x, s, z, grid.element)
        return QTensor(q.to(torch.uint8).reshape(w.shape), s, grid, dtype, zeros=z.to(torch.uint8))
    if grid.element.kind == "integer":
        s = symmetric_scale(x, grid)
        return QTensor(symmetric_codes(x, s, grid.element).to(torch.int8).reshape(w.shape), s, grid, dtype)
    if grid.scale == "nvfp4":
        tensor_scale = tensor_power(x, peak)
        block = block_scale(x, tensor_scale)
        codes = e2m1_codes(x, e4m3_values(block) * tensor_scale)
        return QTensor(codes.reshape(w.shape), block, grid, dtype, tensor_scale=tensor_scale)
    c = scale_code(amax(x), grid)
    return QTensor(float_codes(x, c, grid.element).reshape(w.shape), c, grid, dtype)


def dequantize(q: QTensor[Tensor]) -> Tensor:
    """The values [..., n] of `q`, computed in fp32 and rounded once to `q.dtype`."""
    codes = q.codes.reshape(q.grid.group_shape(q.shape))
    if q.zeros is not None:
        values = codes.to(torch.float32) - each(q.zeros.to(torch.float32))
    elif q.grid.element.kind == "integer":
        values = codes.to(torch.float32)
    else:
        values = float_values(codes, q.grid.element)
    values = values * each(scale_values(q))
    if q.biases is not None:
        values = alone("add", values, each(q.biases.to(torch.float32)))
    return values.reshape(q.shape).to(DTYPE[q.dtype])


def rounded(
    w: Tensor,
    grid: Grid,
    *,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    peak: Tensor | None = None,
) -> Tensor:
    """`reference.fake_quantize`: the values [..., n] that `w` would have after `dequantize(quantize(w, grid))`, in its type.

    Its gradient has no meaning: see `straight_through`. torch 2.11 compiles that to a gradient of zeros if the last operation
    here returns its argument, as a cast can.
    """
    x = group(w, grid)
    if scales is not None:
        return _static_values(x, grid, scales, zeros).to(w.dtype).reshape(w.shape)
    if grid.scale == "minmax":
        s, z = asymmetric_scale(x, grid.element)
        values = (asymmetric_codes(x, s, z, grid.element) - each(z)) * each(s)
    elif grid.element.kind == "integer":
        s = symmetric_scale(x, grid)
        values = symmetric_codes(x, s, grid.element) * each(s)
    elif grid.scale == "nvfp4":
        tensor_scale = tensor_power(x, peak) + poison(x.abs().amax() if peak is None else peak)
        s = e4m3_values(block_scale(x, tensor_scale)) * tensor_scale
        values = float_values(e2m1_codes(x, s), grid.element) * each(s)
    else:
        peak = amax(x)
        c = scale_code(peak, grid)
        values = float_values(float_codes(x, c, grid.element), grid.element) * each(power(c) + poison(peak))
    return values.to(w.dtype).reshape(w.shape)


def unclipped(
    w: Tensor,
    grid: Grid,
    *,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    peak: Tensor | None = None,
) -> Tensor:
    """Where `w` [..., n] rounds to a code without being clipped, as booleans; see `reference.unclipped`."""
    x = group(w.detach(), grid)
    step, z = _steps(x, grid, peak) if scales is None else (scales, zeros)
    if grid.element.kind == "float":
        inside = x.abs() <= each(grid.element.largest * step)
    elif z is None:
        q = quotient(x, each(step))
        inside = (q >= grid.element.lowest) & (q <= grid.element.highest)
    else:
        q = quotient(x, each(step)) + each(z.to(torch.float32))
        inside = (q >= 0) & (q <= grid.element.levels)
    return inside.reshape(w.shape)


def scale_values(q: QTensor[Tensor]) -> Tensor:
    """The fp32 step of every group [..., groups]: the factor of its codes."""
    if q.grid.read:
        return read_steps(q)
    if q.tensor_scale is not None:
        return e4m3_values(q.scales) * q.tensor_scale
    return power(q.scales) if q.grid.element.kind == "float" else q.scales


def _static_values(x: Tensor, grid: Grid, s: Tensor, zeros: Tensor | None) -> Tensor:
    """The values of grouped `x` on given fp32 steps; NaN where `x` is not finite."""
    if zeros is not None:
        z = zeros.to(torch.float32)
        values = (asymmetric_codes(x, s, z, grid.element) - each(z)) * each(s)
    elif grid.element.kind == "integer":
        values = symmetric_codes(x, s, grid.element) * each(s)
    else:
        values = float_values(float_codes(x, exponent(s), grid.element), grid.element) * each(s)
    return values + poison(x)


def _steps(x: Tensor, grid: Grid, peak: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The fp32 step of every group of `x`, and its zero point under `minmax`."""
    if grid.scale == "minmax":
        return asymmetric_scale(x, grid.element)
    if grid.element.kind == "integer":
        return symmetric_scale(x, grid), None
    if grid.scale == "nvfp4":
        tensor_scale = tensor_power(x, peak)
        return e4m3_values(block_scale(x, tensor_scale)) * tensor_scale, None
    return power(scale_code(amax(x), grid)), None


# Shapes and types


def group(w: Tensor, grid: Grid) -> Tensor:
    """[..., n] -> float32 [..., groups, group]."""
    want_chosen(grid)
    return w.to(torch.float32).reshape(grid.group_shape(tuple(w.shape)))


def each(per_group: Tensor) -> Tensor:
    """[..., groups] -> [..., groups, 1]: one value for each group, to broadcast over the group's elements."""
    return per_group.unsqueeze(-1)


# Integer scales (R3, R5)


def symmetric_scale(x: Tensor, grid: Grid) -> Tensor:
    """The scale of each group under a symmetric rule, on the bfloat16 grid, at least 2^-96 in magnitude."""
    rule = SYMMETRIC_RULES.get(grid.scale)
    return rule(x, grid.element) if rule else computed_by_law("symmetric_scale", x, grid)


def symmetric_codes(x: Tensor, s: Tensor, element: Element) -> Tensor:
    """Codes -2^(bits-1) .. 2^(bits-1)-1 as floats: x/s to nearest even."""
    return quotient(x, each(s)).clamp(element.lowest, element.highest)


def asymmetric_scale(x: Tensor, element: Element) -> tuple[Tensor, Tensor]:
    """Scale and zero point 0 .. 2^bits-1 (a float) of each group under `minmax`; zero is always representable."""
    low, high = x.amin(dim=-1).clamp_max(0.0), x.amax(dim=-1).clamp_min(0.0)
    s = round_to_bfloat16((high - low) * STEP[element.name, "minmax"]).clamp_min(constants.MIN_SCALE) + poison(
        high - low
    )
    return s, quotient(-low, s).clamp(0, element.levels)


def asymmetric_codes(x: Tensor, s: Tensor, z: Tensor, element: Element) -> Tensor:
    """Codes 0 .. 2^bits-1 as floats."""
    return (quotient(x, each(s)) + each(z)).clamp(0, element.levels)


def quotient(x: Tensor, s: Tensor) -> Tensor:
    """x/s to the nearest integer, ties to even, exactly; `s` has 8 significant bits.

    Compiled for a GPU, a division may be off by an ulp and land on the wrong side of a tie. There any close candidate q is
    compared with its neighbours by the products (2q+1)s and (2q-1)s, which are exact; an odd q moves on a tie.
    """
    if not (torch.compiler.is_compiling() and x.is_cuda):
        return torch.round(x / s)
    a, step = x.abs(), s.abs()
    q = torch.round(a * (1.0 / step)).clamp(0.0, 512.0)
    odd = (q.to(torch.int32) & 1) == 1
    up, down = (2.0 * q + 1.0) * step, (2.0 * q - 1.0) * step
    q = (
        q
        + ((2.0 * a > up) | (odd & (2.0 * a == up))).to(q.dtype)
        - ((2.0 * a < down) | (odd & (2.0 * a == down))).to(q.dtype)
    )
    return torch.where((x < 0) != (s < 0), -q, q) + (x + s) * 0.0


# Power-of-two scales (R6)


def scale_code(peak: Tensor, grid: Grid) -> Tensor:
    """E8M0 codes (uint8) of groups whose largest magnitude is `peak`; code c means 2^(c-127)."""
    rule = POWER_RULES.get(grid.scale)
    if rule is None:
        return computed_by_law("scale_code", peak, grid)
    return rule(peak, grid.element).clamp(constants.MIN_SCALE_CODE, constants.MAX_SCALE_CODE).to(torch.uint8)


def exponent(s: Tensor) -> Tensor:
    """The inverse of `power`."""
    return (bits(s) >> 23).to(torch.uint8)


def power(c: Tensor) -> Tensor:
    """2^(c-127) for codes 1 .. 254."""
    return (c.to(torch.int32) << 23).view(torch.float32)


# Small floats (R7, R8)


def float_codes(x: Tensor, c: Tensor, element: Element) -> Tensor:
    """The bits (uint8) of each of `x` as an `element` under the E8M0 codes `c` of its group."""
    if element.name == "e2m1":
        return e2m1_codes(x, power(c))
    down = power(2 * 127 - c.to(torch.int32))
    y = (x * each(down)).clamp(-element.largest, element.largest)
    return y.to(FLOAT8[element.name]).view(torch.uint8)


def float_values(codes: Tensor, element: Element) -> Tensor:
    """The values of small floats, given their bits, as float32."""
    if element.name == "e2m1":
        return e2m1_values(codes)
    return codes.view(FLOAT8[element.name]).to(torch.float32)


def e2m1_codes(x: Tensor, s: Tensor) -> Tensor:
    """Four-bit codes (uint8): how many boundaries lie below abs(x)/s, ties to even, saturating; the sign is the high bit."""
    a = x.abs()
    codes = ((bits(x) >> 28) & 8).to(torch.uint8)
    for boundary, included in constants.E2M1_BOUNDARIES:
        edge = each(boundary * s)
        codes = codes + (a >= edge if included else a > edge).to(torch.uint8)
    return codes


def e2m1_values(codes: Tensor) -> Tensor:
    """The values of four-bit codes, as float32: exponent and mantissa shifted into place, 0.5 apart, the sign ORed in."""
    c = codes.to(torch.int32)
    magnitude = c & 7
    normal = ((magnitude >> 1) + 126 << 23) | ((magnitude & 1) << 22)
    pattern = torch.where(magnitude > 1, normal, magnitude * 0x3F000000)
    return (pattern | ((c & 8) << 28)).view(torch.float32)


# NVFP4 (R9)


def shared_peak(weights: Sequence[Tensor]) -> Tensor:
    """The largest magnitude of all `weights`, float32 []; NaN if there is a NaN."""
    peaks = [weight.detach().abs().amax().to(torch.float32) for weight in weights]
    return torch.stack([peak.full_tensor() if hasattr(peak, "full_tensor") else peak for peak in peaks]).amax()


def tensor_power(x: Tensor, peak: Tensor | None = None) -> Tensor:
    """The power of two, shape (), over all block scales of a tensor: its `peak` (default: its own) over 6 * 448, rounded up."""
    c = ceil_exponent((x.abs().amax() if peak is None else peak) * constants.NVFP4_STEP)
    return power(c.clamp(constants.MIN_SCALE_CODE, constants.MAX_SCALE_CODE))


def block_scale(x: Tensor, tensor_scale: Tensor) -> Tensor:
    """The e4m3 bits (uint8) of each block's scale; never zero, so that no block loses its values to its scale."""
    down = power(2 * 127 - (bits(tensor_scale) >> 23))
    s = amax(x) * down * STEP["e2m1", "nvfp4"]
    return s.clamp(constants.MIN_BLOCK_SCALE, 448.0).to(FLOAT8["e4m3"]).view(torch.uint8)


def e4m3_values(codes: Tensor) -> Tensor:
    """The values of e4m3 numbers, given their bits, as float32."""
    return codes.view(FLOAT8["e4m3"]).to(torch.float32)
