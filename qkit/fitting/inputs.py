"""`Inputs`: the moments of a layer's inputs, prepared once where its weights are solved, on the host or on an engine's device."""

from typing import Any

from numpy.typing import NDArray

from qkit.engines.abilities import offers
from qkit.engines.protocol import Arrays
from qkit.engines.solving import Solves
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.reference.fitting import fit
from qkit.reference.moments import Moments


class Inputs:
    """E[x x'] of the inputs of layers, for `solve` of their weights.

    Args:
        moments: [n, n].
        engine: solves the grids that it says it solves, with the codes of the law; None: the law does.
    """

    def __init__(self, moments: NDArray[Any], engine: Arrays | None = None) -> None:
        self._moments, self._engine = moments, engine
        self._on_host: Moments | None = None
        self._on_device: Any = None

    def solve(self, w: NDArray[Any], grid: Grid, *, peak: float | None = None) -> QTensor[NDArray[Any]]:
        """As `reference.fitting.fit` with `method="solve"`.

        Raises:
            GridError, RangeError: as `qkit.fit`.
        """
        if self._engine is not None and offers(self._engine, Solves) and self._engine.solves(grid) and w.ndim == 2:
            if self._on_device is None:
                self._on_device = self._engine.prepare_moments(self._moments)
            return self._engine.solve(w, grid, self._on_device, peak=peak)
        if self._on_host is None:
            self._on_host = Moments.of(self._moments)
        return fit(w, grid, self._on_host, method="solve", peak=peak)


def solves(engine: Arrays | None, grid: Grid) -> bool:
    """Whether `engine` solves weights on `grid` by itself."""
    return engine is not None and offers(engine, Solves) and engine.solves(grid)
