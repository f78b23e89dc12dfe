"""The verbs of `qkit.engines.solving.Solves`."""

from typing import Any

import torch
from numpy.typing import NDArray

from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit_torchao.arithmetic.fitting import solve_on
from qkit_torchao.arithmetic.moments import DeviceMoments


class Solving:
    """Solves weights on a GPU.

    Attributes:
        device: of new tensors.
    """

    device: torch.device

    def solves(self, grid: Grid) -> bool:
        """See `Solves.solves`: on a GPU, grids whose rows have scales of their own; with zero points, where kernels take them."""
        if self.device.type != "cuda" or grid.group == "tensor":
            return False
        return grid.scale != "minmax" or (isinstance(grid.group, int) and self._has_kernels(grid, grid.group))

    def _has_kernels(self, grid: Grid, inputs: int) -> bool:
        from qkit_torchao.kernels import fits  # here: it imports this package

        return fits.has_kernels(grid, inputs, self.device)

    def prepare_moments(self, moments: NDArray[Any]) -> DeviceMoments:
        """See `Solves.prepare_moments`."""
        return DeviceMoments.of(moments, self.device)

    def solve(
        self, w: NDArray[Any], grid: Grid, moments: DeviceMoments, *, peak: float | None = None
    ) -> QTensor[NDArray[Any]]:
        """See `Solves.solve`."""
        return solve_on(w, grid, moments, device=self.device, peak=peak)
