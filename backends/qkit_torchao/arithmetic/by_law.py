"""The scale rules that `rounding` computes in torch. The reference computes every other rule, in NumPy: right, but slow."""

from collections.abc import Callable
from functools import wraps
from typing import cast

import torch
from torch import Tensor

from qkit.grid import Grid
from qkit.reference import rounding as law

#: Written out, and not taken from `qkit.element`: a new rule is not this engine's before `rounding` has it.
RULES = frozenset({"signed", "absmax", "midmax", "minmax", "rceil", "even", "floor", "nvfp4"})

Scale = Callable[[Tensor, Grid], Tensor]


def by_law(scale: Scale) -> Scale:
    """`scale`, but under a rule that is not among `RULES` the function of the reference that has the same name."""

    @wraps(scale)
    def scale_or_law(x: Tensor, grid: Grid) -> Tensor:
        return scale(x, grid) if grid.scale in RULES else _in_numpy(scale.__name__, x, grid)

    return scale_or_law


def _compute(name: str, x: Tensor, grid: Grid) -> Tensor:
    return torch.from_numpy(getattr(law, name)(x.detach().cpu().numpy(), grid)).to(x.device)


WHY = "the reference computes this scale rule, in NumPy: call the function eagerly"
_in_numpy = cast("Callable[[str, Tensor, Grid], Tensor]", torch.compiler.disable(_compute, reason=WHY))
