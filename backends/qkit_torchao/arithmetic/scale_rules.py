"""`qkit/reference/scale_rules.py` in torch: how the scale of each group follows from its values. Arrays only.

The tables declare the rules that torch computes itself. For any other rule the law computes the scales, see `computed_by_law`.
`minmax` and `nvfp4` are in `rounding`.
"""

from collections.abc import Callable
from typing import Final, cast

import torch
from torch import Tensor

from qkit.element import MIN_SCALE, STEP, Element
from qkit.grid import Grid
from qkit.reference import rounding as law

# Integers (R3)


def signed_scale(x: Tensor, element: Element) -> Tensor:
    """The scale under `signed`: the element of largest magnitude gets the lowest code, whatever its sign."""
    high, low = x.amax(dim=-1), x.amin(dim=-1)
    peak = torch.where(high >= -low, high, low)
    s = round_to_bfloat16(peak * STEP[element.name, "signed"])
    least = torch.where(bits(peak) > 0, -MIN_SCALE, MIN_SCALE)
    return torch.where(s.abs() < MIN_SCALE, least, s) + poison(peak)


def absmax_scale(x: Tensor, element: Element) -> Tensor:
    """The scale under `absmax`: the largest magnitude gets the highest code."""
    return _peak_scale(x, STEP[element.name, "absmax"])


def midmax_scale(x: Tensor, element: Element) -> Tensor:
    """The scale under `midmax`: the largest magnitude lies half a step above the highest code."""
    return _peak_scale(x, STEP[element.name, "midmax"])


def _peak_scale(x: Tensor, multiplier: float) -> Tensor:
    peak = amax(x)
    return round_to_bfloat16(peak * multiplier).clamp_min(MIN_SCALE) + poison(peak)


#: The symmetric rules of torch: (grouped values, element) -> scales with 8 significant bits.
SYMMETRIC_RULES: Final[dict[str, Callable[[Tensor, Element], Tensor]]] = {
    "signed": signed_scale,
    "absmax": absmax_scale,
    "midmax": midmax_scale,
}


# Small floats (R6)


def rceil_code(peak: Tensor, element: Element) -> Tensor:
    """The code under `rceil`, before it is clipped: the smallest power of two that clips nothing."""
    return ceil_exponent(peak * STEP[element.name, "rceil"])


def even_code(peak: Tensor, element: Element) -> Tensor:
    """The code under `even`, before it is clipped: the peak is first rounded to the element's mantissa."""
    return ((bits(peak) + (1 << (22 - element.mantissa))) >> 23) - element.max_exponent


def floor_code(peak: Tensor, element: Element) -> Tensor:
    """The code under `floor`, before it is clipped: the peak's exponent less the element's largest (OCP MX 1.0)."""
    return (bits(peak) >> 23) - element.max_exponent


#: The rules of torch with E8M0 scales: (largest magnitudes of groups, element) -> codes, not clipped yet.
POWER_RULES: Final[dict[str, Callable[[Tensor, Element], Tensor]]] = {
    "rceil": rceil_code,
    "even": even_code,
    "floor": floor_code,
}


def _computed_by_law(name: str, x: Tensor, grid: Grid) -> Tensor:
    return torch.from_numpy(getattr(law, name)(x.detach().cpu().numpy(), grid)).to(x.device)


#: The scales that the law's function `name` gives, in NumPy, under a rule that torch does not compute itself: right, but slow.
computed_by_law = cast(
    "Callable[[str, Tensor, Grid], Tensor]",
    torch.compiler.disable(_computed_by_law, reason="NumPy computes this scale rule: call the function eagerly"),
)


# Bits


def bits(x: Tensor) -> Tensor:
    """The fp32 patterns of `x`, as int32."""
    return x.view(torch.int32)


def amax(x: Tensor) -> Tensor:
    """Largest magnitude of each group; NaN for a group with a NaN."""
    return x.abs().amax(dim=-1)


def poison(peak: Tensor) -> Tensor:
    """0 where `peak` is finite, else NaN. Added to the scale of a group with a NaN or an infinity, it makes the group NaN."""
    return peak * 0.0


def round_to_bfloat16(x: Tensor) -> Tensor:
    """`x` with 8 significant bits, ties to even (RNE8). Written with integers, since compilers delete the pair of casts."""
    u = bits(x)
    return ((u + 0x7FFF + ((u >> 16) & 1)) & ~0xFFFF).view(torch.float32)


def ceil_exponent(x: Tensor) -> Tensor:
    """127 + ceil(log2(x)) for positive normal `x`, from its bits."""
    u = bits(x)
    return (u >> 23) + ((u & 0x7FFFFF) != 0).to(torch.int32)
