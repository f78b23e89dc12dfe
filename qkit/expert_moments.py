"""The moments of experts in a block of a model: which experts have enough tokens, their notes, and their fit beside drift."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.config import read_config
from qkit.engines.abilities import require
from qkit.engines.blocks import Blocks, Hidden, Mixture, Seen
from qkit.engines.layer import Layer
from qkit.engines.mixtures import Mixes
from qkit.engines.protocol import Arrays
from qkit.expert_fits import fit_experts
from qkit.experts import paths_of
from qkit.fitting.inputs import Inputs
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.reference.fitting import fit
from qkit.reference.rounding import dequantize


@dataclass(frozen=True, slots=True)
class Mixed:
    """The experts of one block, to be fitted.

    Attributes:
        engine: that of the models.
        mixtures: by the path of their layer.
        layers: of the float model, by path.
        grids: of their weights, by path.
    """

    engine: Arrays
    mixtures: Mapping[str, Mixture]
    layers: Mapping[str, Layer]
    grids: Mapping[str, Grid]

    def fit(
        self, fitted: Blocks, number: int, states: Iterable[Hidden]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, dict[str, Any]]]:
        """Solves the experts of block `number` of `fitted` by their own inputs there, in place.

        Returns:
            The moments, and the notes of all experts.
        """
        seen = fitted.run(number, states, {}, put=lambda _: None, experts=self.mixtures)
        tensors, layers = dict[str, NDArray[Any]](), dict[str, dict[str, Any]]()
        for path, mixture in self.mixtures.items():
            enough = with_enough(seen, mixture)
            tensors |= moments_of(enough)
            layers |= noted_experts(seen, enough, mixture)
            fitted.put_experts(path, self._values(path, mixture, enough))
        return tensors, layers

    def _values(self, path: str, mixture: Mixture, enough: Mapping[str, Seen]) -> dict[str, NDArray[np.float32]]:
        prepared = dict[str, Inputs]()

        def solved(w: Any, at: str, peak: float | None) -> QTensor[Any]:
            w = self.engine.to_numpy(w)
            if at not in enough:
                return fit(w, grid, peak=peak)
            like = enough[at].like
            if like not in prepared:
                moments = enough[like].moments
                assert moments is not None
                prepared.clear()  # gate and up of one expert follow each other
                prepared[like] = Inputs(moments, self.engine)
            return prepared[like].solve(w, grid, peak=peak)

        grid, weights = self.grids[path], require(self.engine, Mixes).experts(self.layers[path].module)
        found = fit_experts(weights, grid, mixture.paths, self.engine.magnitude, solved)
        return {name: np.stack([dequantize(q) for q in several]) for name, several in found.items()}


def mixtures_of(layers: Mapping[str, Layer], grids: Mapping[str, Grid], folder: Path) -> dict[str, Mixture]:
    """The experts among `layers`, by path, with the grids of their inputs and their paths in the files of `folder`."""
    found = {path: layer for path, layer in layers.items() if layer.kind == "experts"}
    config = read_config(folder) if found else None
    return {path: Mixture(grids.get(path), paths_of(path, layer.projections, config)) for path, layer in found.items()}


def with_enough(seen: Mapping[str, Seen], mixture: Mixture) -> dict[str, Seen]:
    """The experts that as many tokens reached as they have inputs, at least."""
    found = {path: seen[path] for path in mixture.paths.values() if path in seen}
    moments = {path: one.moments for path, one in found.items() if one.moments is not None}
    return {path: one for path, one in found.items() if one.tokens >= len(moments[one.like])}


def moments_of(seen: Mapping[str, Seen]) -> dict[str, NDArray[Any]]:
    """The moments of layers that have some of their own."""
    return {path: one.moments for path, one in seen.items() if one.moments is not None}


def noted(one: Seen, grid: Grid | None) -> dict[str, Any]:
    """The inputs of a layer as `Statistics` has them."""
    return {"like": one.like, "tokens": one.tokens, "activation": None if grid is None else str(grid)}


def noted_experts(seen: Mapping[str, Seen], enough: Mapping[str, Seen], mixture: Mixture) -> dict[str, Any]:
    """As `noted`, for every expert; those with too few tokens are marked. None, where the class shows no inputs."""
    if not seen.keys() & set(mixture.paths.values()):
        return {}
    found = {path: seen.get(path, Seen(path, None, 0)) for path in mixture.paths.values()}
    return {path: noted(one, mixture.grid) | ({} if path in enough else {"few": True}) for path, one in found.items()}
