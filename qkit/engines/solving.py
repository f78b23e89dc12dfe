"""The seam of `solve` on a device: engines that have the codes of the law faster than NumPy does."""

from typing import Any, Protocol

from numpy.typing import NDArray

from qkit.engines.protocol import Arrays
from qkit.grid import Grid
from qkit.qtensor import QTensor


class Solves(Arrays, Protocol):
    """Engines with a form of `solve` of their own, which has the bits of the law."""

    def solves(self, grid: Grid) -> bool:
        """Whether this engine, on its device, is to be asked for codes on `grid`; NumPy solves all others."""
        ...

    def prepare_moments(self, moments: NDArray[Any]) -> Any:
        """E[x x'] [n, n] as `solve` takes them, on the device.

        Raises:
            GridError, RangeError: as `qkit.fit`.
        """
        ...

    def solve(self, w: NDArray[Any], grid: Grid, moments: Any, *, peak: float | None = None) -> QTensor[NDArray[Any]]:
        """As `qkit.fit` of `w` [outputs, inputs] with `method="solve"`, with the same bits.

        Args:
            moments: of `prepare_moments`.
            peak: as for `Arrays.quantize`.

        Raises:
            GridError, RangeError: as `qkit.fit`.
        """
        ...
