"""Learning rates as a pure function of the step."""

import math
from typing import Literal, get_args

Shape = Literal["linear", "cosine", "constant"]
SHAPES: tuple[Shape, ...] = get_args(Shape)


def rate(step: int, *, peak: float, steps: int, warmup: int, shape: Shape) -> float:
    """The learning rate of `step`, 1 .. `steps`. It rises to `peak` at step `warmup`, and would reach zero after the last step.

    >>> [rate(step, peak=4.0, steps=5, warmup=2, shape="linear") for step in (1, 2, 3, 5)]
    [2.0, 4.0, 3.0, 1.0]
    """
    if step < warmup:
        return peak * step / warmup
    if shape == "constant":
        return peak
    done = (step - warmup) / (steps - warmup + 1)
    return peak * (1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def warmup_steps(warmup: float | int, steps: int) -> int:
    """How many steps warm up. An int `warmup` is a number of steps, at most all; a float is a share of all, rounded up."""
    return min(warmup, steps) if isinstance(warmup, int) else math.ceil(warmup * steps)
