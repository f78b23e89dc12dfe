"""AdamW that steps a parameter in one compiled kernel, also in an eager loop."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from qkit.reference.learned import is_learned, is_offset
from qkit_mlx.cache.values import LastValue

Arrays = tuple[mx.array, ...]


class AdamW(optim.AdamW):
    """`mlx.optimizers.AdamW` with bias correction, as torch's AdamW: decoupled weight decay, except on learned ranges.

    Learned offsets (`reference.learned.is_offset`) have their own learning rate, also a number or a schedule.

    Computes in float32, and stores `m` and `v` in the type of the parameter. Steps replace weights. Prepared layers then drop the
    cached values of the old weight, and quantize the new one at their next call.
    """

    def __init__(
        self,
        *,
        learning_rate: Any,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        offset_learning_rate: Any,
    ) -> None:
        super().__init__(learning_rate, list(betas), eps, weight_decay, bias_correction=True)
        self._maybe_schedule("offset_learning_rate", offset_learning_rate)
        self._cached: tuple[LastValue[Arrays], LastValue[Arrays]] = (LastValue(), LastValue())  #: factors, by `offset`
        self._ranges: set[int] = set()
        self._offsets: set[int] = set()

    @property
    def offset_learning_rate(self) -> mx.array:
        """The learning rate of zero points and exponent offsets."""
        rate: mx.array = self.state["offset_learning_rate"]
        return rate

    @offset_learning_rate.setter
    def offset_learning_rate(self, rate: Any) -> None:
        self.state["offset_learning_rate"] = mx.array(rate)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The parameters after a step; see `mlx.optimizers.Optimizer`."""
        self._ranges, self._offsets = ids_named(gradients, is_learned), ids_named(gradients, is_offset)
        return super().apply_gradients(gradients, parameters)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """The parameter after a step; also updates `m` and `v` in `state`."""
        offset = id(gradient) in self._offsets
        rate, cached = (self.offset_learning_rate if offset else self.learning_rate), self._cached[offset]
        keep, *factors = cached.of(self.step, lambda step: self._factors(step, rate), rate)
        keep = keep if self.decays(parameter) and id(gradient) not in self._ranges else mx.ones_like(keep)
        step = _compiled_step(*self.betas, self.eps)
        parameter, state["m"], state["v"] = step(gradient, parameter, state["m"], state["v"], keep, *factors)
        return parameter

    def decays(self, parameter: mx.array) -> bool:
        """Whether weight decay shrinks `parameter`."""
        return True

    def _factors(self, step: mx.array, learning_rate: mx.array) -> Arrays:
        """The factors of a step: of all parameters, of all `m` and of all roots of `v`."""
        (b1, b2), t, rate = self.betas, step.astype(mx.float32), learning_rate.astype(mx.float32)
        return 1 - rate * self.weight_decay, rate / (1 - b1**t), mx.rsqrt(1 - b2**t)


def ids_named(gradients: Any, wanted: Callable[[str], bool]) -> set[int]:
    """The ids of the gradients of parameters with a `wanted` name. `apply_single` gets these objects, but no names."""
    flat: Any = tree_flatten(gradients)
    return {id(gradient) for name, gradient in flat if wanted(name)}


@lru_cache(maxsize=64)
def _compiled_step(b1: float, b2: float, eps: float) -> Callable[..., Arrays]:
    """Algorithm 2 of Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, with the schedule in the learning rate."""

    def step(
        gradient: mx.array,
        parameter: mx.array,
        m: mx.array,
        v: mx.array,
        keep: mx.array,
        rate: mx.array,
        root: mx.array,
    ) -> Arrays:
        g, p, m32, v32 = (array.astype(mx.float32) for array in (gradient, parameter, m, v))
        m32 = b1 * m32 + (1 - b1) * g
        v32 = b2 * v32 + (1 - b2) * g * g
        p = p * keep - rate * m32 / (mx.sqrt(v32) * root + eps)
        return p.astype(parameter.dtype), m32.astype(m.dtype), v32.astype(v.dtype)

    compiled: Callable[..., Arrays] = mx.compile(step)
    return compiled
