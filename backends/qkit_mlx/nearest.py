"""Small floats without their codes, for training, where only values are wanted: a third of the passes over memory."""

import mlx.core as mx

from qkit.element import Element


def nearest_values(y: mx.array, element: Element) -> mx.array:
    """What `ops.float_values` makes of the codes nearest to `y`, ties to even, saturating.

    `y` may be a rounded quotient x/s, if s has at most 8 significant bits: whatever lies between two boundaries of an element,
    which have at most 5 bits, stays between them.
    """
    y = mx.clip(y, -element.largest, element.largest)
    power = (y.view(mx.int32) & 0x7F800000).view(
        mx.float32
    )  # neighbours of y are this, or the least of it, over 2^mantissa apart
    quantum = mx.maximum(power, 2.0**element.min_exponent) * 2.0**-element.mantissa
    return mx.round(y / quantum) * quantum
