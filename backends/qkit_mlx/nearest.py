"""Small floats without their codes, for training, where only values are wanted: a fifth of the passes over memory."""

import mlx.core as mx

from qkit.element import Element


def nearest_values(x: mx.array, element: Element, *, step: mx.array | float) -> mx.array:
    """The multiple by a number of `element` of `step`, a power of two, that is nearest to `x`, ties to even; NaN where `step` is.

    No `x` is larger than the largest, or not by so much that it rounds to the next. It may be a rounded quotient, if the divisor
    has at most 8 significant bits: whatever lies between two boundaries of an element, which have at most 5 bits, stays there.
    """
    power = (x.view(mx.int32) & 0x7F800000).view(mx.float32)  # neighbours of x are this over 2^mantissa apart,
    quantum = mx.maximum(power, step * 2.0**element.min_exponent) * 2.0**-element.mantissa  # or those of zero
    return mx.round(x / quantum) * quantum
