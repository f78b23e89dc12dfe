"""Values of small floats without their codes, for training: half of the passes over memory, or fewer. Not in the law."""

import mlx.core as mx

from qkit.element import MIN_SCALE_CODE, STEP, Element

LAST_BEFORE_TWO = 2.0 - 2.0**-23


def round_to_element(x: mx.array, element: Element, *, step: mx.array | float) -> mx.array:
    """The number of `element`, times `step`, that is nearest to `x`, ties to even; NaN where the step is not finite.

    `x` may be a rounded quotient, if the divisor has at most 8 significant bits. The boundaries between numbers of an element
    have at most 5 bits, so that no such quotient rounds across one.

    Args:
        x: clipped; it may exceed the largest number by less than half of the distance to the next.
        step: a power of two.
    """
    smallest = step * 2.0**element.min_exponent if element.min_exponent else step  # of the normal numbers
    quantum = mx.maximum(leading_bit(x), smallest) * 2.0**-element.mantissa  # the distance between neighbours
    return mx.round(x / quantum) * quantum


def ceil_scale(peak: mx.array, element: Element) -> mx.array:
    """The step under `rceil` of groups whose largest magnitude is `peak`, in few operations; infinite where `peak` is not finite.

    The product with the last number before 2 exceeds the next power of two, unless the number is a power of two itself.
    """
    ceiling = leading_bit(peak * STEP[element.name, "rceil"] * LAST_BEFORE_TWO)
    return mx.maximum(ceiling, 2.0 ** (MIN_SCALE_CODE - 127))


def leading_bit(x: mx.array) -> mx.array:
    """The largest power of two in each of `x`, from its bits; infinite where `x` is not finite, 0 where it is subnormal."""
    return (x.view(mx.int32) & 0x7F800000).view(mx.float32)
