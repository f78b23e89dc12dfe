"""Fitted codes of many experts: those of each by its own inputs."""

from collections.abc import Callable, Mapping
from typing import Any

from qkit.experts import Codes, Weights
from qkit.fused import shares
from qkit.grid import Grid
from qkit.qtensor import QTensor


def fit_experts(
    weights: Weights,
    grid: Grid,
    paths: Mapping[tuple[int, str], str],
    magnitude: Callable[[Any], float],
    fit: Callable[[Any, str, float | None], QTensor[Any]],
) -> Codes:
    """As `quantize_experts`, with codes that `fit` finds for each matrix, its path in files, and the peak that it shares."""
    out: Codes = {name: [] for name in weights}
    pair = [name for name in ("gate_proj", "up_proj") if name in weights]
    for (number, name), path in sorted(
        paths.items()
    ):  # those of one expert after another: gate and up have the same inputs
        together = pair if name in pair else [name]
        peak = max(magnitude(weights[one][number]) for one in together) if shares(grid) else None
        out[name].append(fit(weights[name][number], path, peak))
    return out
