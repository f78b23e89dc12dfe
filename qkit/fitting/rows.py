"""The fit of a weight whose rows make up for each other's errors, as `qkit.metric` couples them.

The law solves each row by itself. Here the rows of a weight are solved in parts, one after another, and each part aims at its
weight plus what makes up for the errors of the parts before: with F = R R', R upper triangular, and errors E of the first rows,
the best continuous rows are off by -R_bb'^-1 R_ab' E. It is the feedback of `solve`, from row to row.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from qkit.fitting.inputs import Inputs
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.reference.rounding import dequantize

DAMPING = 0.1  #: of the mean of the diagonal of F: the gradients of some tokens say little of weak directions
PARTS = 8  #: of the rows


def solve_rows(
    w: NDArray[np.float32], grid: Grid, known: Inputs, metric: NDArray[np.float32] | None, *, peak: float | None
) -> tuple[NDArray[np.float32], QTensor[NDArray[np.generic]]]:
    """The weight [outputs, inputs] that rows aimed at, and their codes: those of `Inputs.solve` for this weight.

    Args:
        w: the weight to come near to.
        metric: F [outputs, outputs]; None or zeros: no row makes up for another.
        peak: as for `Inputs.solve`.
    """
    if metric is None or grid.group == "tensor" or not metric.any():
        return w, known.solve(w, grid, peak=peak)
    order = np.argsort(-metric.diagonal(), kind="stable")
    upper = root_of(metric[np.ix_(order, order)])
    aims, errors = w.copy(), np.empty(w.shape)
    parts: list[tuple[NDArray[np.int64], QTensor[NDArray[np.generic]]]] = []
    for begin, end in _bounds(len(w)):
        rows = order[begin:end]
        if begin:
            feedback = upper[:begin, begin:end].T @ errors[:begin]
            aims[rows] = w[rows] + np.linalg.solve(upper[begin:end, begin:end].T, feedback)
        q = known.solve(aims[rows], grid, peak=peak)
        errors[begin:end] = w[rows].astype(np.float64) - dequantize(q)
        parts.append((rows, q))
    return aims, _joined(parts)


def root_of(metric: NDArray[np.float32]) -> NDArray[np.float64]:
    """R, upper triangular, with R R' = F + damping."""
    f = metric.astype(np.float64)
    f[np.diag_indices(len(f))] += DAMPING * f.diagonal().mean()
    return np.ascontiguousarray(np.linalg.cholesky(f[::-1, ::-1])[::-1, ::-1])


def _bounds(rows: int) -> list[tuple[int, int]]:
    """The first and the last of each part of so many rows."""
    ends = [rows * part // min(PARTS, rows) for part in range(min(PARTS, rows) + 1)]
    return list(pairwise(ends))


def _joined(parts: list[tuple[NDArray[np.int64], QTensor[NDArray[np.generic]]]]) -> QTensor[NDArray[np.generic]]:
    """Parts of rows as one, each row in its place."""
    places = np.argsort(np.concatenate([rows for rows, _ in parts]))

    def put(name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(q, name) for _, q in parts])[places]

    first = parts[0][1]
    return replace(first, codes=put("codes"), scales=put("scales"), zeros=None if first.zeros is None else put("zeros"))
