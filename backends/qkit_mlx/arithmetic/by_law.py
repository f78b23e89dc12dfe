"""The scale rules that `rounding` computes in MLX. The reference computes every other rule, in NumPy: right, but slow."""

from collections.abc import Callable
from functools import wraps

import mlx.core as mx
import numpy as np

from qkit.errors import BackendError
from qkit.grid import Grid
from qkit.reference import rounding as law

#: Written out, and not taken from `qkit.element`: a new rule is not this engine's before `rounding` has it.
RULES = frozenset({"signed", "absmax", "midmax", "minmax", "rceil", "even", "floor", "nvfp4"})

Scale = Callable[[mx.array, Grid], mx.array]


def by_law(scale: Scale) -> Scale:
    """`scale`, but under a rule that is not among `RULES` the function of the reference that has the same name.

    That function raises a BackendError while a function is compiled or vectorized: it needs evaluated arrays.
    """

    @wraps(scale)
    def scale_or_law(x: mx.array, grid: Grid) -> mx.array:
        return scale(x, grid) if grid.scale in RULES else _in_numpy(scale.__name__, x, grid)

    return scale_or_law


def _in_numpy(name: str, x: mx.array, grid: Grid) -> mx.array:
    try:
        numbers = np.array(x)
    except ValueError:  # MLX has no other way to ask whether an array is a placeholder
        raise BackendError(f"mlx does not compile the scale rule {grid.scale!r}: call the function eagerly") from None
    return mx.array(getattr(law, name)(numbers, grid))
