"""`qkit/reference/scale_rules.py` in MLX: how the scale of each group follows from its values. Arrays only.

The tables declare the rules that MLX computes itself. For any other rule the law computes the scales, see `computed_by_law`.
`minmax` and `nvfp4` are in `rounding`.
"""

from collections.abc import Callable
from typing import Any, Final

import mlx.core as mx
import numpy as np

from qkit.element import MIN_SCALE, STEP, Element
from qkit.errors import BackendError
from qkit.grid import Grid

# Integers (R3)


def signed_scale(x: mx.array, element: Element) -> mx.array:
    """The scale under `signed`: the element of largest magnitude gets the lowest code, whatever its sign."""
    high, low = x.max(axis=-1), x.min(axis=-1)
    peak = mx.where(high >= -low, high, low)
    s = round_to_bfloat16(peak * STEP[element.name, "signed"])
    least = mx.where(bits(peak) > 0, -MIN_SCALE, MIN_SCALE)
    return mx.where(mx.abs(s) < MIN_SCALE, least, s) + poison(peak)


def absmax_scale(x: mx.array, element: Element) -> mx.array:
    """The scale under `absmax`: the largest magnitude gets the highest code."""
    return _peak_scale(x, STEP[element.name, "absmax"])


def midmax_scale(x: mx.array, element: Element) -> mx.array:
    """The scale under `midmax`: the largest magnitude lies half a step above the highest code."""
    return _peak_scale(x, STEP[element.name, "midmax"])


def _peak_scale(x: mx.array, multiplier: float) -> mx.array:
    s = round_to_bfloat16((peak := amax(x)) * multiplier)
    return mx.maximum(s, MIN_SCALE) + poison(peak)


#: The symmetric rules of MLX: (grouped values, element) -> scales with 8 significant bits.
SYMMETRIC_RULES: Final[dict[str, Callable[[mx.array, Element], mx.array]]] = {
    "signed": signed_scale,
    "absmax": absmax_scale,
    "midmax": midmax_scale,
}


# Small floats (R6)


def rceil_code(peak: mx.array, element: Element) -> mx.array:
    """The code under `rceil`, before it is clipped: the smallest power of two that clips nothing."""
    return ceil_exponent(peak * STEP[element.name, "rceil"])


def even_code(peak: mx.array, element: Element) -> mx.array:
    """The code under `even`, before it is clipped: the peak is first rounded to the element's mantissa."""
    return ((bits(peak) + (1 << (22 - element.mantissa))) >> 23) - element.max_exponent


def floor_code(peak: mx.array, element: Element) -> mx.array:
    """The code under `floor`, before it is clipped: the peak's exponent less the element's largest (OCP MX 1.0)."""
    return (bits(peak) >> 23) - element.max_exponent


#: The rules of MLX with E8M0 scales: (largest magnitudes of groups, element) -> codes, not clipped yet.
POWER_RULES: Final[dict[str, Callable[[mx.array, Element], mx.array]]] = {
    "rceil": rceil_code,
    "even": even_code,
    "floor": floor_code,
}


def computed_by_law(function: Callable[[Any, Grid], Any], x: mx.array, grid: Grid) -> mx.array:
    """`function(x, grid)` of the law, in NumPy: the scales under a rule that MLX does not compute itself.

    Raises:
        BackendError: a compiled function has no values for NumPy.
    """
    try:
        values = np.array(mx.stop_gradient(x))
    except ValueError:  # MLX has no other way to ask whether an array is a placeholder
        raise BackendError(
            f"MLX does not compile {grid.scale} scales of {grid}: run the model without mx.compile, or choose another rule"
        ) from None
    with np.errstate(all="ignore"):
        return mx.array(function(values, grid))


# Bits


def bits(x: mx.array) -> mx.array:
    """The fp32 patterns of `x`, as int32."""
    return x.view(mx.int32)


def amax(x: mx.array) -> mx.array:
    """Largest magnitude of each group; NaN for a group with a NaN."""
    return mx.abs(x).max(axis=-1)


def poison(peak: mx.array) -> mx.array:
    """0 where `peak` is finite, else NaN. Added to the scale of a group with a NaN or an infinity, it makes the group NaN."""
    return peak * 0.0


def round_to_bfloat16(x: mx.array) -> mx.array:
    """`x` with 8 significant bits, ties to even (RNE8). In integers, since compilers delete a pair of casts."""
    u = bits(x)
    return ((u + 0x7FFF + ((u >> 16) & 1)) & ~0xFFFF).view(mx.float32)


def ceil_exponent(x: mx.array) -> mx.array:
    """127 + ceil(log2(x)) for positive normal `x`, from its bits."""
    return (bits(x) + 0x7FFFFF) >> 23
