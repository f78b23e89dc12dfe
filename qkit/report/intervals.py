"""Estimates with 95 % intervals by a paired bootstrap, which draws the same windows of text for every model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qkit.errors import QkitError

Numbers = NDArray[np.float64]
DRAWS = 2000
SEED = 0
LEVEL = 95.0  #: per cent
BLOCK = 1 << 18  #: windows that one block of draws holds


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number measured on windows of text, and its 95 % interval: percentiles over new draws of the windows."""

    value: float
    low: float
    high: float


def mean(losses: Numbers) -> Estimate:
    """The mean of `losses` [windows]. Pass a difference of two models' losses for a paired interval.

    Raises:
        QkitError: there are fewer than two windows.
    """
    (drawn,) = _drawn([losses])
    return _estimate(float(losses.mean()), drawn)


def recovered(floats: Numbers, untrained: Numbers, trained: Numbers) -> Estimate | None:
    """The share of the cost of quantizing (untrained less float) that training won back (untrained less trained).

    Args:
        floats, untrained, trained: losses [windows] on the same windows.

    Returns:
        The share; None where quantizing cost nothing, in the text or in some draw.

    Raises:
        QkitError: there are fewer than two windows.
    """
    cost = float(untrained.mean() - floats.mean())
    costs, won = _drawn([untrained - floats, untrained - trained])
    if cost <= 0 or costs.min() <= 0:
        return None
    return _estimate(float(untrained.mean() - trained.mean()) / cost, won / costs)


def _drawn(series: Sequence[Numbers]) -> Numbers:
    """The means [series, draws] of each of `series` [windows], over the same windows drawn with replacement."""
    stacked = np.stack(series)
    windows = stacked.shape[1]
    if windows < 2:
        raise QkitError("an interval needs at least 2 windows of text: give more text, or a shorter length")
    random = np.random.default_rng(SEED)
    found = np.empty((len(stacked), DRAWS))
    step = max(1, BLOCK // windows)
    for start in range(0, DRAWS, step):
        draws = found[:, start : start + step].shape[1]
        found[:, start : start + step] = stacked[:, random.integers(0, windows, (draws, windows))].mean(-1)
    return found


def _estimate(value: float, drawn: Numbers) -> Estimate:
    low, high = np.percentile(drawn, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return Estimate(value, float(low), float(high))
