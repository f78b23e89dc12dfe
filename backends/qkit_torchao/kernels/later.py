"""Launches over many weights that are prepared now and run later, which `cache.ahead` has; on a GPU only."""

from collections.abc import Callable

from torch import Tensor

from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit_torchao.kernels import choose


def values(
    weights: list[Tensor], targets: list[Tensor], gates: list[Tensor], grid: Grid
) -> Callable[[Tensor, Tensor], None] | None:
    """The launch of `choose.compute_values`, of weights without partners, by the first weight and the first target.

    None, where a launch does not take all of them.
    """
    kernels = choose.on_gpu(weights[0])
    if kernels is None or not all(kernels.takes(w, grid) for w in weights):
        return None
    launch: Callable[[Tensor, Tensor], None] | None = kernels.values_launch(weights, targets, gates, grid)
    return launch


def codes(
    weights: list[Tensor], targets: list[tuple[QTensor[Tensor], Tensor]]
) -> Callable[[Tensor, Tensor], None] | None:
    """The launch of `choose.quantize_into`, by the first weight and the codes of the first target; None as for `values`."""
    grid, kernels = targets[0][0].grid, choose.on_gpu(weights[0])
    if kernels is None or not all(kernels.quantizes_together(w, grid) for w in weights):
        return None
    launch: Callable[[Tensor, Tensor], None] = kernels.codes_launch(weights, targets, grid)
    return launch
