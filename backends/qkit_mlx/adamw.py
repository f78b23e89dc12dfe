"""AdamW whose step on a parameter is one compiled kernel, also where nothing around it is compiled."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim


class AdamW(optim.AdamW):
    """`mlx.optimizers.AdamW` with bias correction, which is torch's: decoupled weight decay, on every parameter.

    Computes in float32, and keeps `m` and `v` in the type of the parameter.
    """

    def __init__(self, *, learning_rate: Any, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(learning_rate, list(betas), eps, weight_decay, bias_correction=True)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """The parameter after a step; `m` and `v` in `state` move with it."""
        step = _compiled(*self.betas, self.eps, self.weight_decay)
        moved = step(gradient, parameter, state["m"], state["v"], self.learning_rate, self.step)
        parameter, state["m"], state["v"] = moved
        return parameter


@lru_cache(maxsize=64)
def _compiled(b1: float, b2: float, eps: float, weight_decay: float) -> Callable[..., tuple[mx.array, ...]]:
    """Algorithm 2 of Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, with the schedule in the learning rate."""

    def step(
        gradient: mx.array, parameter: mx.array, m: mx.array, v: mx.array, learning_rate: mx.array, count: mx.array
    ) -> tuple[mx.array, ...]:
        g, p, m32, v32 = (array.astype(mx.float32) for array in (gradient, parameter, m, v))
        rate, t = learning_rate.astype(mx.float32), count.astype(mx.float32)
        m32 = b1 * m32 + (1 - b1) * g
        v32 = b2 * v32 + (1 - b2) * g * g
        size = mx.sqrt(v32) * mx.rsqrt(1 - b2**t) + eps
        p = p * (1 - rate * weight_decay) - rate / (1 - b1**t) * m32 / size
        return p.astype(parameter.dtype), m32.astype(m.dtype), v32.astype(v.dtype)

    compiled: Callable[..., tuple[mx.array, ...]] = mx.compile(step)
    return compiled
