"""The metric of a layer's outputs: F = E[g g'], where g is the gradient of the log-probability of a label that the model draws.

A small error e of the outputs of a layer moves the distribution of the model by a divergence of e' F e / 2 (Fisher information).
Errors of rows that F couples can make up for each other, as those of inputs do under `solve` (YAQA,
https://arxiv.org/abs/2505.22988). The backward pass runs the float model block by block; states between blocks lie in files.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from qkit.engines.blocks import Blocks, Hidden
from qkit.errors import RangeError
from qkit.fitting.run import Run

TOKENS = 1 << 15  #: at most: their states before all blocks lie on the disk at once
WIDEST = 8192  #: outputs of a layer; the matrix of wider ones would take more memory than their weight
SEED = 0  #: of the labels
STATES = "states"  #: the name of the metric of the outputs of a block
SLOPE = "slope"  #: the name of the gradients between two blocks


def gather_metrics(
    run: Run, blocks: Blocks, rows: NDArray[np.int32], watched: Sequence[Collection[str]], *, batch: int
) -> None:
    """Writes the metrics of layers of a float model beside the states of `run`; nothing where an interrupted run did.

    Args:
        rows: tokens [windows, length], of which the first are used.
        watched: paths of layers, for each block.
        batch: windows that run at once.

    Raises:
        RangeError: gradients are not finite.
    """
    if run.has(_metric(0)):  # the last one to be written
        return
    rows = rows[: max(TOKENS // rows.shape[1], 1)]
    starts, count = range(0, len(rows), batch), len(blocks.paths)
    put = _putting(run, _before(0), 0, rows.shape)
    for start in starts:
        put(blocks.enter(rows[start : start + batch]))
    for number in range(count):
        blocks.run(number, run.states(_before(number), 0), {}, put=_putting(run, _before(number + 1), 0, rows.shape))
        blocks.rest(number)
    labels = np.random.default_rng(SEED).random(rows.shape, np.float32)
    put = _putting(run, SLOPE, count, rows.shape)
    for start, states in zip(starts, run.states(_before(count), 0), strict=True):
        put(blocks.draw(states, labels[start : start + batch]))
    for number in reversed(range(count)):
        run.drop(_before(number + 1))
        found = _pull(run, blocks, number, watched[number], rows.shape)
        run.save(_metric(number), {path: (total / rows.size).astype(np.float32) for path, total in found.items()})
        blocks.rest(number)
    run.drop(_before(0))
    run.drop(SLOPE)


def metrics_of(run: Run, number: int) -> dict[str, NDArray[np.float32]]:
    """The metrics [outputs, outputs] of layers of a block, by path, and of its states; empty where nothing was gathered."""
    return run.load(_metric(number)) if run.has(_metric(number)) else {}


def _pull(
    run: Run, blocks: Blocks, number: int, watched: Collection[str], shape: tuple[int, ...]
) -> dict[str, NDArray[np.float64]]:
    """Sums of g g' of the outputs of layers of a block; writes the gradient of its inputs."""
    sums: dict[str, NDArray[np.float64]] = {}
    put = _putting(run, SLOPE, number, shape)
    for states, gradient in zip(run.states(_before(number), 0), run.states(SLOPE, number + 1), strict=True):
        before, shown = blocks.pull(number, states, gradient, watched)
        put(before)
        for path, g in (*shown.items(), (STATES, np.array(gradient.reshape(-1, gradient.shape[-1])))):
            sums[path] = sums.get(path, np.zeros(())) + blocks.product(g, g)
    for path, total in sums.items():
        if not np.isfinite(total).all():
            raise RangeError(
                f"{path}: the gradients of its outputs hold NaN or infinity: an input of a layer was not finite, or half "
                "precision overflows; find its origin, or calibrate in float32"
            )
    return sums


def _putting(run: Run, name: str, number: int, shape: tuple[int, ...]) -> Callable[[Hidden], None]:
    """A function that writes states of rows of this `shape` to a file, one batch after another."""
    place = 0

    def put(part: Hidden) -> None:
        nonlocal place
        run.put(name, number, place, part, shape=(*shape, part.shape[-1]))
        place += len(part)

    return put


def _before(number: int) -> str:
    return f"before-{number:05}"


def _metric(number: int) -> str:
    return f"metric-{number:05}"
