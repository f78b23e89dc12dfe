"""The results of a comparison as plain values, which the page, the picture, the table and report.json show."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qkit.report.code_changes import CodeChange
from qkit.report.intervals import Estimate


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of the report.

    Attributes:
        name: `float`, `PTQ`, `QAT`, `QAT on ...`: see `Comparison`.
        grid: the recipe it is deployed on; empty for a float model.
        source: the directory that the model comes from, and how.
        loss: nats per token, and its interval.
        above: the loss less that of the baseline float model, paired, in nats per token.
        bits, nbytes: stored bits per number of the model, and bytes of all its tensors, as `qkit.coverage` counts.
        kl, agreement: divergence from the model of the float directory, and share of equal likeliest tokens.
    """

    name: str
    grid: str
    source: str
    loss: Estimate
    above: Estimate
    perplexity: float
    kl: float
    agreement: float
    bits: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Premium:
    """The gain of training and the cost of deployment on one grid, in nats per token.

    Attributes:
        grid: the recipe the weights are deployed on.
        training: by the untrained baseline, `PTQ` and `longer PTQ`, its loss less that of QAT, on this grid: positive where
            training saves.
        deployment: QAT on this grid less QAT on the grid it was trained for: positive where the change of grid costs. None on
            the trained grid.
        recovered: by the same baselines, the share of the cost of quantizing that training wins back: the cost is the loss of
            the untrained baseline less that of `Comparison.baseline`. None: quantizing costs nothing.
    """

    grid: str
    training: Mapping[str, Estimate]
    deployment: Estimate | None
    recovered: Mapping[str, Estimate | None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The results of `compare`.

    Attributes:
        recipe: the name of the recipe that `qat` was trained for.
        recipes: this recipe and those of the other grids, in full, as tables.
        baseline: the name of the row that losses are counted from: of `float` and `float, longer` the one with the lower
            loss, so that no share grows by float training that overfitted.
        rows: `float`; with a longer one, `float, longer`; for each grid `PTQ` and `QAT`, the trained grid first.
        premiums: one for each grid, the trained one first; empty without a trained model.
        trained: PTQ to QAT, layer by layer; empty without a trained model.
        deployed: QAT to QAT on each other grid, layer by layer.
        masters: the weights that were put on the other grids: a directory, or the artifact's dequantized values.
        masters_equal: on the trained grid, how many codes of the master weights equal those of the artifact, and of how many.
            None: there is no directory of master weights.
    """

    recipe: str
    recipes: tuple[Mapping[str, Any], ...]
    baseline: str
    rows: tuple[Measured, ...]
    premiums: tuple[Premium, ...]
    trained: tuple[CodeChange, ...]
    deployed: Mapping[str, tuple[CodeChange, ...]]
    masters: str
    masters_equal: tuple[int, int] | None
    tokens: int
    windows: int
    length: int
