"""Comparing an engine with the reference number by number: codes and scales byte for byte, values with ==."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit import reference
from qkit.engines.protocol import Arrays
from qkit.grid import Grid
from qkit.notebook import table
from qkit.qtensor import DType
from qkit.testing.hard_tensors import COUPLED_SHAPE, coupled, random, tensors

BATCH = 12  #: grids per compiled function: enough of them to share what a compilation costs whatever its size

Outputs = list[NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Parity:
    """How many numbers of a backend differ from the reference on one grid.

    Attributes:
        backend, grid, dtype, compiled: the subject of the comparison.
        codes, scales, values: how many differ; zero points and tensor scales count as scales, and values are
            those of `dequantize(quantize(w))` and of `fake_quantize(w)`, the mask `unclipped(w)`, and, on grids of a whole
            tensor, values and mask on given scales that clip.
        compared: how many numbers were compared.
        error: the reason why nothing could be compared; else empty.
    """

    backend: str
    grid: Grid
    dtype: DType
    compiled: bool
    codes: int = 0
    scales: int = 0
    values: int = 0
    compared: int = 0
    error: str = ""

    @property
    def exact(self) -> bool:
        """Whether everything was compared and nothing differs."""
        return not (self.error or self.codes or self.scales or self.values)

    def _repr_html_(self) -> str:
        return ParityTable([self])._repr_html_()


class ParityTable(list[Parity]):
    """The results of several comparisons, such as `ParityTable(compare_many(...))`: a table in notebooks."""

    def _repr_html_(self) -> str:
        rows = (
            (
                str(one.grid),
                one.backend + (" compiled" if one.compiled else ""),
                one.dtype,
                *(f"{count:,}" for count in (one.codes, one.scales, one.values, one.compared)),
                "equal" if one.exact else one.error or "differs",
            )
            for one in self
        )
        exact = sum(one.exact for one in self)
        head = ("grid", "engine", "type", "codes", "scales", "values", "compared", "")
        return table(f"{exact:,} of {len(self):,} comparisons with the reference are equal", head, rows)


def compare(engine: Arrays, grid: Grid, *, dtype: DType, compiled: bool, size: int) -> Parity:
    """`engine` beside the reference on the tensors of `qkit.testing` and on `size` random numbers."""
    return next(compare_many(engine, [grid], dtype=dtype, compiled=compiled, size=size))


def compare_many(engine: Arrays, grids: Iterable[Grid], *, dtype: DType, compiled: bool, size: int) -> Iterator[Parity]:
    """`compare` for each of `grids`; compiled ones several in one function, since compiling is slow."""
    grids = list(grids)
    if not compiled:
        for grid in grids:
            yield _compare(engine, [grid], dtype=dtype, compiled=False, size=size)[0]
        return
    for _, alike in groupby(grids, key=lambda grid: len(inputs(grid, dtype, size))):
        same = list(alike)
        for i in range(0, len(same), BATCH):
            yield from _compare_compiled(engine, same[i : i + BATCH], dtype=dtype, size=size)


@lru_cache(maxsize=16)
def inputs(grid: Grid, dtype: DType, size: int) -> tuple[NDArray[Any], ...]:
    """The arrays to quantize: one with all tensors stacked, or for a coupled grid several of one shape."""
    hard = list(tensors(grid, dtype).values())
    if coupled(grid):
        count = -(-size // (COUPLED_SHAPE[0] * COUPLED_SHAPE[1]))
        return (*hard, *(random(COUPLED_SHAPE, seed, dtype) for seed in range(count)))
    inputs = hard[0].shape[-1]
    return (np.concatenate([*hard, random((-(-size // inputs), inputs), 7, dtype)]),)


@lru_cache(maxsize=16)
def expected(grid: Grid, dtype: DType, size: int) -> tuple[Outputs, ...]:
    """The reference's outputs for each of `inputs`."""
    law: Any = reference
    return tuple(_outputs(law, grid, w, static_parts(grid, w)) for w in inputs(grid, dtype, size))


def static_parts(grid: Grid, w: NDArray[Any]) -> Outputs:
    """Scale, and zero point if any, for half the range of `w`, so that it clips; empty if `grid` cannot be static."""
    if grid.group != "tensor":
        return []
    q = reference.quantize(np.array([w.min(), w.max()], np.float32) / 2, grid)
    parts = [reference.scale_values(q)] + ([] if q.zeros is None else [q.zeros])
    return [part.reshape((1,) * w.ndim) for part in parts]


def _outputs(engine: Arrays, grid: Grid, w: Any, static: Sequence[Any]) -> list[Any]:
    """The outputs to compare: codes and other parts, then values and masks."""
    q = engine.quantize(w, grid)
    made = [*q.parts().values(), engine.dequantize(q), engine.fake_quantize(w, grid), engine.unclipped(w, grid)]
    if not static:
        return made
    given = dict(zip(("scales", "zeros"), static, strict=False))
    return [*made, engine.fake_quantize(w, grid, **given), engine.unclipped(w, grid, **given)]


def _compare_compiled(engine: Arrays, grids: Sequence[Grid], *, dtype: DType, size: int) -> list[Parity]:
    """Compiles one function for all grids. If it fails, compiles each alone, so that the report names those that fail."""
    together = _compare(engine, grids, dtype=dtype, compiled=True, size=size)
    if len(grids) == 1 or not together[0].error:
        return together
    return [_compare(engine, [grid], dtype=dtype, compiled=True, size=size)[0] for grid in grids]


def _compare(engine: Arrays, grids: Sequence[Grid], *, dtype: DType, compiled: bool, size: int) -> list[Parity]:
    """Compares `grids` in one function of as many arrays."""
    results = [Parity(engine.name, grid, dtype, compiled) for grid in grids]
    function = _everything(engine, grids)
    try:
        run = engine.compile(function) if compiled else function
        for i, ws in enumerate(zip(*(inputs(grid, dtype, size) for grid in grids), strict=True)):
            given = [[w, *static_parts(grid, w)] for grid, w in zip(grids, ws, strict=True)]
            made = [engine.to_numpy(array) for array in run(*(engine.from_numpy(x) for xs in given for x in xs))]
            for j, grid in enumerate(grids):
                want = expected(grid, dtype, size)[i]
                results[j] = _count(results[j], made[: len(want)], want)
                made = made[len(want) :]
    except Exception as error:  # an engine may fail in any way: the matrix shows it, and goes on
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Parity(engine.name, grid, dtype, compiled, error=reason) for grid in grids]
    return results


def _everything(engine: Arrays, grids: Sequence[Grid]) -> Callable[..., tuple[Any, ...]]:
    static = [0 if grid.group != "tensor" else 1 if grid.symmetric else 2 for grid in grids]

    def everything(*given: Any) -> tuple[Any, ...]:
        made: list[Any] = []
        for grid, more in zip(grids, static, strict=True):
            made += _outputs(engine, grid, given[0], given[1 : 1 + more])
            given = given[1 + more :]
        return tuple(made)

    # torch gives up after eight compilations of one code object, so each function has its own
    everything.__code__ = everything.__code__.replace()
    return everything


def _count(parity: Parity, made: Outputs, want: Outputs) -> Parity:
    """`parity` with the mismatches of one run added: codes come first, then scales, and values and masks last."""
    parts = len(want) - (5 if parity.grid.group == "tensor" else 3)
    pairs = list(zip(made, want, strict=True))
    return replace(
        parity,
        codes=parity.codes + _different_bytes(*pairs[0]),
        scales=parity.scales + sum(_different_bytes(*pair) for pair in pairs[1:parts]),
        values=parity.values + sum(_different_values(*pair) for pair in pairs[parts:]),
        compared=parity.compared + sum(array.size for array in want),
    )


def _different_bytes(made: NDArray[Any], want: NDArray[Any]) -> int:
    if made.dtype != want.dtype or made.shape != want.shape:
        return want.size
    one = np.dtype(f"u{want.dtype.itemsize}")
    return int(np.count_nonzero(np.ascontiguousarray(made).view(one) != np.ascontiguousarray(want).view(one)))


def _different_values(made: NDArray[Any], want: NDArray[Any]) -> int:
    if made.dtype != want.dtype or made.shape != want.shape:
        return want.size
    return want.size - int(np.count_nonzero(made == want))
