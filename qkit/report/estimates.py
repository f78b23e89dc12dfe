"""From the measurements of models to the rows and premiums of a comparison."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qkit.report.findings import Measured, Premium
from qkit.report.intervals import mean, recovered
from qkit.report.measured import Measurement

LONGER: Final = "float, longer"  #: the row of the float model that was trained longer
UNTRAINED: Final = ("PTQ", "longer PTQ")  #: the rows of the two float models on the grid


@dataclass(frozen=True, slots=True)
class Row:
    """A measured model: the recipe it is deployed on, its directory and how it was made, and its measurement."""

    grid: str
    source: str
    measurement: Measurement


Found = dict[str, Row]  #: by the name of the row


def baseline(found: Mapping[str, Row]) -> str:
    """The float model with the lower loss. A longer one that overfitted would make every cost of quantizing look small."""
    return min((name for name in ("float", LONGER) if name in found), key=lambda name: _losses(found, name).mean())


def rows_of(found: Mapping[str, Row], base: str) -> Iterator[Measured]:
    """The rows of the report, with their losses above those of `base`."""
    zero = _losses(found, base)
    for name, row in found.items():
        one = row.measurement.evaluation
        assert one.kl is not None
        assert one.agreement is not None
        yield Measured(
            name,
            row.grid,
            row.source,
            loss=mean(one.losses),
            above=mean(one.losses - zero),
            perplexity=one.perplexity,
            kl=float(one.kl.mean()),
            agreement=float(one.agreement.mean()),
            bits=row.measurement.bits,
            nbytes=row.measurement.nbytes,
        )


def premium(found: Mapping[str, Row], grid: str, *, home: str, base: str) -> Premium:
    """The gain of training for `home` on `grid`, over each untrained baseline, and the cost of `grid` over `home`."""
    place = "" if grid == home else f" on {grid}"
    floats, qat = _losses(found, base), _losses(found, f"QAT{place}")
    untrained = {name: _losses(found, f"{name}{place}") for name in UNTRAINED if name in found}
    return Premium(
        grid,
        {name: mean(losses - qat) for name, losses in untrained.items()},
        mean(qat - _losses(found, "QAT")) if place else None,
        {name: recovered(floats, losses, qat) for name, losses in untrained.items()},
    )


def _losses(found: Mapping[str, Row], name: str) -> NDArray[np.float64]:
    return found[name].measurement.evaluation.losses
