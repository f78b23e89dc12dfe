"""Drift correction: the weights that a fitted model should aim at, since its states drift away from the float model's.

Before a layer is solved, W' = W + E[d x'] (H + 0.1 mean diag H)^-1, where x are the inputs in the fitted model, H = E[x x'] their
moments, and d the difference of the outputs of the float model and the fitted one. For the layers that add to the states, d is
the difference of the states after them, so that they take back the drift of all layers before (GPTAQ,
https://arxiv.org/abs/2504.02692; LoaQ, https://arxiv.org/abs/2509.06297; Qronos, https://arxiv.org/abs/2505.11695).

Tokens weigh as the inverse of the mean square of their float state after the block: the next norm divides by its root, so that an
error counts as a share of the state. Rows of a weight make up for each other's errors; see `qkit.fitting.rows` and `qkit.metric`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit import fused
from qkit.engines.blocks import Blocks, Hidden
from qkit.engines.protocol import Arrays
from qkit.fitting.inputs import Inputs
from qkit.fitting.rows import solve_rows
from qkit.grid import Grid
from qkit.qtensor import QTensor
from qkit.reference.rounding import dequantize

DAMPING = 0.1  #: of the mean square of the inputs: a correction in directions without inputs would be noise
FAINTEST = (
    0.01  #: of the mean square of the states of a batch: a token whose state has less weighs as if it had so much
)
EQUAL = 1e-3  #: relative difference of states up to which a layer counts as added to them

Shown = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]  #: inputs and outputs [tokens, n] by path, in order


@dataclass(frozen=True, slots=True)
class Aim:
    """The aim of a layer's fit.

    Attributes:
        weight: the corrected weight [outputs, inputs].
        like: the layer with the moments of both.
        q: its codes by `solve`.
        moments: weighted E[x x'] of its inputs in the fitted model, or None where another layer has them.
        peak: of `nvfp4`, the largest magnitude of all weights that share the tensor scale.
        tokens: how many inputs there were.
    """

    weight: NDArray[np.float32]
    q: QTensor[NDArray[Any]]
    like: str
    moments: NDArray[np.float32] | None
    peak: float | None
    tokens: int


def correct_block(
    number: int,
    float_model: Blocks,
    fitted: Blocks,
    states: Callable[[], Iterable[tuple[Hidden, Hidden]]],
    grids: Mapping[str, Grid],
    weights: Mapping[str, NDArray[Any]],
    metrics: Mapping[str, NDArray[np.float32]],
    engine: Arrays | None = None,
) -> dict[str, Aim]:
    """Fits the layers of block `number` of `fitted` one group after another, in place, and returns their aims.

    Args:
        states: gives batches of the states before the block, of the float model and of the fitted one.
        grids: of the weights of the layers to fit, by path.
        weights: the float weights of these layers.
        metrics: of their outputs, see `qkit.metric`; rows of layers without one are solved apart.
        engine: one that may solve on its device; see `Inputs`.
    """
    first = next(iter(states()))[0]
    out, shown = float_model.look(number, first, tuple(grids))
    adding = _added(first, out, shown)
    aims: dict[str, Aim] = {}
    for group in _groups(shown):
        moments, corrections, tokens = _sums(number, float_model, fitted, states, group, adding)
        damped = moments + np.eye(len(moments)) * (DAMPING * moments.diagonal().mean())
        aimed = {
            path: (weights[path].astype(np.float64) + np.linalg.solve(damped, corrections[path].T).T).astype(np.float32)
            for path in group
        }
        h, peaks = moments.astype(np.float32), _peaks(aimed, grids)
        known = Inputs(h, engine)
        for path, weight in aimed.items():
            aim, q = solve_rows(weight, grids[path], known, metrics.get(path), peak=peaks.get(path))
            aims[path] = Aim(aim, q, group[0], h if path == group[0] else None, peaks.get(path), tokens)
            fitted.put(path, dequantize(q))
    return aims


def correct_head(
    path: str, float_model: Blocks, fitted: Blocks, states: Iterable[tuple[Hidden, Hidden]]
) -> tuple[NDArray[np.float32], int] | None:
    """M [n, n], by which the weight W of a float layer behind the blocks becomes W + W M, and the number of tokens.

    None where the layer does not run for every token, or the tokens are fewer than its inputs.

    It is the same correction: d is W (x - x'), of the inputs in the float model and in the fitted one.

    Args:
        states: batches of those after the last block, of the float model and of the fitted one.
    """
    moments, apart, tokens = np.zeros(()), np.zeros(()), 0
    for theirs, ours in states:
        x, own = float_model.inputs_after(theirs, path), fitted.inputs_after(ours, path)
        if not len(x) == len(own) == theirs.shape[0] * theirs.shape[1]:
            return None
        moments = moments + fitted.product(own, own)
        apart, tokens = apart + fitted.product(x - own, own), tokens + len(own)
    if tokens < len(moments):
        return None
    damped = moments + np.eye(len(moments)) * (DAMPING * moments.diagonal().mean())
    return np.linalg.solve(damped, apart.T).T.astype(np.float32), tokens


def _groups(shown: Shown) -> list[list[str]]:
    """The layers with equal inputs that run one after another."""
    groups: list[list[str]] = []
    for path, (x, _) in shown.items():
        if groups and np.array_equal(shown[groups[-1][0]][0], x):
            groups[-1].append(path)
        else:
            groups.append([path])
    return groups


def _added(before: Hidden, after: Hidden, shown: Shown) -> tuple[str, str] | None:
    """The two layers whose outputs are all that a block adds to its states, in order; None in blocks that do otherwise."""
    flat, end = (x.reshape(-1, x.shape[-1]) for x in (before, after))
    last = next(reversed(shown))
    for path, (_, y) in shown.items():
        if path == last or y.shape != flat.shape or shown[last][1].shape != flat.shape:
            continue
        if np.abs(flat + y + shown[last][1] - end).max() <= EQUAL * np.abs(end).max():
            return path, last
    return None


def _sums(
    number: int,
    float_model: Blocks,
    fitted: Blocks,
    states: Callable[[], Iterable[tuple[Hidden, Hidden]]],
    group: list[str],
    adding: tuple[str, str] | None,
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]], int]:
    """Weighted E[x x'] of the inputs of a group in the fitted model, and E[d x'] of each of its layers; how many inputs."""
    moments: NDArray[np.float64] = np.zeros(())
    corrections: dict[str, NDArray[np.float64]] = {path: np.zeros(()) for path in group}
    tokens, weight = 0, 0.0
    for theirs, ours in states():
        (end, wanted), (own_end, found) = float_model.look(number, theirs, group), fitted.look(number, ours, group)
        x, shares = found[group[0]][0], _shares(end)
        weighted = (shares[:, None] * x).astype(np.float32)
        moments = moments + fitted.product(weighted, x)
        tokens, weight = tokens + len(x), weight + float(shares.sum())
        for path in group:
            d = wanted[path][1] - found[path][1]
            if adding and path == adding[0]:
                d = d + (theirs - ours).reshape(d.shape)
            elif adding and path == adding[1]:
                d = (end - own_end).reshape(d.shape)
            corrections[path] = corrections[path] + fitted.product(d, weighted)
    return moments / weight, {path: total / weight for path, total in corrections.items()}, tokens


def _shares(states: Hidden) -> NDArray[np.float64]:
    """The weights of tokens with float `states` [batch, length, width]; one for each where all states are zero."""
    squares = np.square(states.reshape(-1, states.shape[-1]).astype(np.float64)).mean(axis=1)
    mean = squares.mean()
    return 1 / np.maximum(squares, FAINTEST * mean) if mean > 0 else np.ones(len(squares))


def _peaks(aimed: Mapping[str, NDArray[np.float32]], grids: Mapping[str, Grid]) -> dict[str, float]:
    """The largest magnitudes that `nvfp4` weights share, by path."""
    sharing = [path for path in aimed if fused.shares(grids[path])]
    peaks = {path: float(np.abs(aimed[path]).max()) for path in sharing}
    for together in fused.groups(sharing):
        peaks |= dict.fromkeys(together, max(peaks[path] for path in together))
    return peaks
