"""AdamW's steps in one launch, which write quantized values besides; on CUDA with Triton."""

from typing import Any

from torch import Tensor

from qkit.grid import Grid
from qkit_torchao.kernels.tables import Target


def step(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
    targets: list[Target | None],
    **hyper: Any,
) -> None:
    """See `cuda_adamw.step`; on CUDA with Triton."""
    from qkit_torchao.kernels import cuda_adamw

    cuda_adamw.step(weights, gradients, states, targets, **hyper)


def target_of(weight: Tensor, values: Tensor, grid: Grid, gate: Tensor) -> Target | None:
    """A target for `step`: `values` of `weight`, if a step can write them; on CUDA with Triton."""
    from qkit_torchao.kernels import cuda_adamw

    target = Target(values, grid, gate)
    return target if cuda_adamw.writes(weight, target) else None
