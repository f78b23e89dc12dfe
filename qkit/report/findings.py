"""What a comparison found, as plain values: what the page, the picture, the table and report.json are made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qkit.report.code_changes import Move
from qkit.report.intervals import Estimate


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of the report.

    Attributes:
        name: `float`, `PTQ`, `QAT`, `QAT on ...`: see `Comparison`.
        grid: the recipe it is deployed on; empty for a float model.
        source: what it was made of.
        loss: nats per token, and its interval.
        above: the loss less that of the baseline float model, paired, in nats per token.
        kl, agreement: against the float directory.
    """

    name: str
    grid: str
    source: str
    loss: Estimate
    above: Estimate
    perplexity: float
    kl: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Premium:
    """What one thing is worth on one deploy grid, in nats per token, other things equal.

    Attributes:
        grid: the recipe the weights are deployed on.
        training: PTQ less QAT, on this grid: positive where training helped.
        deployment: QAT on this grid less QAT on the grid it was trained for: positive where the move costs. None on that grid.
        recovered: share of the loss that quantizing costs on this grid, won back by training; None where it costs nothing.
    """

    grid: str
    training: Estimate
    deployment: Estimate | None
    recovered: Estimate | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found.

    Attributes:
        recipe: the grid that was trained for, by its recipe's name.
        recipes: it and those of the other grids, in full, as tables.
        baseline: the name of the row that losses are counted from: `float`, or `float, longer`.
        rows: `float`; with a longer one, `float, longer`; for each grid `PTQ` and `QAT`, the trained grid first.
        premiums: one for each grid, the trained one first; empty without a trained model.
        trained: PTQ to QAT, layer by layer; empty without a trained model.
        deployed: QAT to QAT on each other grid, layer by layer.
        masters: what was put on the other grids: a directory, or the artifact's dequantized values.
        masters_equal: how many codes the master weights give on the trained grid as the artifact has them, of how many;
            None without a directory of masters.
    """

    recipe: str
    recipes: tuple[Mapping[str, Any], ...]
    baseline: str
    rows: tuple[Measured, ...]
    premiums: tuple[Premium, ...]
    trained: tuple[Move, ...]
    deployed: Mapping[str, tuple[Move, ...]]
    masters: str
    masters_equal: tuple[int, int] | None
    tokens: int
    windows: int
    length: int
