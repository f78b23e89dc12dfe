"""Small floats without their codes, for training, where only values are wanted: half of the passes over memory, or fewer."""

import mlx.core as mx

from qkit.element import MIN_SCALE_CODE, STEP, Element

LAST_BEFORE_TWO = 2.0 - 2.0**-23


def nearest_values(x: mx.array, element: Element, *, step: mx.array | float) -> mx.array:
    """The number of `element`, times `step`, that is nearest to `x`, ties to even; NaN where the step is not finite.

    A step is a power of two. No `x` is larger than the largest, or not by so much that it rounds to the next. It may be a rounded
    quotient, if the divisor has at most 8 significant bits: whatever lies between two boundaries of an element, which have at
    most 5 bits, stays there.
    """
    smallest = step * 2.0**element.min_exponent if element.min_exponent else step  # of the normal numbers
    quantum = mx.maximum(leading_bit(x), smallest) * 2.0**-element.mantissa  # neighbours are so far apart
    return mx.round(x / quantum) * quantum


def ceil_scale(peak: mx.array, element: Element) -> mx.array:
    """The step that `rceil` gives to groups whose largest magnitude is `peak`, in few operations; infinite where that is not
    finite.

    A number that is no power of two is over the next one when it is multiplied with the last number before 2; others are not.
    """
    ceiling = leading_bit(peak * STEP[element.name, "rceil"] * LAST_BEFORE_TWO)
    return mx.maximum(ceiling, 2.0 ** (MIN_SCALE_CODE - 127))


def leading_bit(x: mx.array) -> mx.array:
    """The largest power of two in each of `x`, from its bits; infinite where `x` is not finite, 0 where it is subnormal."""
    return (x.view(mx.int32) & 0x7F800000).view(mx.float32)
