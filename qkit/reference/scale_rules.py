"""The scale rules of the law: how the scale of each group follows from its values. `qkit.element` has their constants.

A new rule is an entry in `element.SCALE_RULES` and a function here, in the table of its kind. Engines declare the rules that
they compute themselves; these functions compute every other rule for them. `minmax` and `nvfp4` are in `rounding`.
"""

from collections.abc import Callable
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from qkit import element as constants
from qkit.element import STEP, Element

Floats = NDArray[np.float32]
Exponents = NDArray[np.int32]


# Integers (R3)


def signed_scale(x: Floats, element: Element) -> Floats:
    """The scale under `signed`: the element of largest magnitude gets the lowest code, whatever its sign."""
    high, low = x.max(axis=-1), x.min(axis=-1)
    peak = np.where(high >= -low, high, low)
    s = round_to_bfloat16(peak * np.float32(STEP[element.name, "signed"]))
    least = np.where(bits(peak) > 0, np.float32(-constants.MIN_SCALE), np.float32(constants.MIN_SCALE))
    return np.where(np.abs(s) < np.float32(constants.MIN_SCALE), least, s) + poison(peak)


def absmax_scale(x: Floats, element: Element) -> Floats:
    """The scale under `absmax`: the largest magnitude gets the highest code."""
    return _peak_scale(x, STEP[element.name, "absmax"])


def midmax_scale(x: Floats, element: Element) -> Floats:
    """The scale under `midmax`: the largest magnitude lies half a step above the highest code."""
    return _peak_scale(x, STEP[element.name, "midmax"])


def _peak_scale(x: Floats, multiplier: float) -> Floats:
    peak = amax(x)
    s = round_to_bfloat16(peak * np.float32(multiplier))
    return np.maximum(s, np.float32(constants.MIN_SCALE)) + poison(peak)


#: The symmetric rules of `element.SCALE_RULES`: (grouped values, element) -> scales with 8 significant bits.
SYMMETRIC_RULES: Final[dict[str, Callable[[Floats, Element], Floats]]] = {
    "signed": signed_scale,
    "absmax": absmax_scale,
    "midmax": midmax_scale,
}


# Small floats (R6)


def rceil_code(peak: Floats, element: Element) -> Exponents:
    """The code under `rceil`, before it is clipped: the smallest power of two that clips nothing."""
    return ceil_exponent(peak * np.float32(STEP[element.name, "rceil"]))


def even_code(peak: Floats, element: Element) -> Exponents:
    """The code under `even`, before it is clipped: the peak is first rounded to the element's mantissa."""
    return cast(Exponents, ((bits(peak) + (1 << (22 - element.mantissa))) >> 23) - element.max_exponent)


def floor_code(peak: Floats, element: Element) -> Exponents:
    """The code under `floor`, before it is clipped: the peak's exponent less the element's largest (OCP MX 1.0)."""
    return cast(Exponents, (bits(peak) >> 23) - element.max_exponent)


#: The rules of `element.SCALE_RULES` with E8M0 scales: (largest magnitudes of groups, element) -> codes, not clipped yet.
POWER_RULES: Final[dict[str, Callable[[Floats, Element], Exponents]]] = {
    "rceil": rceil_code,
    "even": even_code,
    "floor": floor_code,
}


# Bits


def bits(x: Floats) -> Exponents:
    """The fp32 patterns of `x`."""
    return x.view(np.int32)


def amax(x: Floats) -> Floats:
    """Largest magnitude of each group; NaN for a group with a NaN."""
    return cast(Floats, np.abs(x).max(axis=-1))


def poison(peak: Floats) -> Floats:
    """0 where `peak` is finite, else NaN. Added to the scale of a group with a NaN or an infinity, it makes the group NaN."""
    return cast(Floats, peak * np.float32(0))


def round_to_bfloat16(x: Floats) -> Floats:
    """`x` with 8 significant bits, ties to even (RNE8). In integers, since compilers delete a pair of casts."""
    u = bits(x)
    return ((u + 0x7FFF + ((u >> 16) & 1)) & ~0xFFFF).view(np.float32)


def ceil_exponent(x: Floats) -> Exponents:
    """127 + ceil(log2(x)) for positive normal `x`, from its bits."""
    u = bits(x)
    return cast(Exponents, (u >> 23) + ((u & 0x7FFFFF) != 0))
