"""Launches of the kernels of `fit.cu` and `factor.cu`: the loops of `arithmetic.fitting` on a GPU, with the bits of the law.

Products over many inputs are torch's: their terms are exact, in any order, see `qkit.reference.products`.
"""

import numpy as np
import torch
from torch import Tensor

from qkit import element as constants
from qkit.errors import RangeError
from qkit.grid import Grid
from qkit.reference import rounding
from qkit.reference.fitting import COLUMNS, WINDOW
from qkit.reference.objectives import damping_of, pull_of
from qkit.reference.products import BLOCK, LONGEST
from qkit.reference.steps import LEAST, LEAST_OF_WIDE, MOST, STEPS
from qkit_torchao.arithmetic import column_loops
from qkit_torchao.arithmetic.exact_products import halves, total
from qkit_torchao.arithmetic.moments import DeviceMoments
from qkit_torchao.kernels import nvrtc
from qkit_torchao.kernels.cuda import device_of
from qkit_torchao.kernels.nvrtc import NUMBER, POINTER

ROWS = 32  #: threads of a program
SHORTEST = 16  #: the shortest group that a thread takes; the longest is a window
RULES = {"signed": 1, "minmax": 2, "nvfp4": 3}  #: by number, as `fit.cu` has them: 0 other integers, 4 other floats
EXACT = ("--fmad=false",)
PANEL = (("BLOCK", BLOCK),)
DAMPING = 4  #: its place among the facts

SEARCH = nvrtc.Kernel("fit.cu", "search", (POINTER,) * 12 + (NUMBER,), options=EXACT)
FEED = nvrtc.Kernel("fit.cu", "feed", (POINTER,) * 11 + (NUMBER,) * 5, options=EXACT)
DESCEND = nvrtc.Kernel("fit.cu", "descend", (POINTER,) * 11 + (NUMBER,) * 4, options=EXACT)
SUBTRACT = nvrtc.Kernel("factor.cu", "subtract", (POINTER,) * 5 + (NUMBER,) * 4, options=EXACT)
ELIMINATE = nvrtc.Kernel("factor.cu", "eliminate", (POINTER,) * 3 + (NUMBER,) * 2, options=EXACT)
ELIMINATE_BELOW = nvrtc.Kernel("factor.cu", "eliminate_below", (POINTER,) * 5 + (NUMBER,), options=EXACT)


def takes(grid: Grid, inputs: int) -> bool:
    """Whether the kernels take rows of this many inputs on `grid`."""
    group = grid.group_shape((1, inputs))[-1]
    return SHORTEST <= group <= COLUMNS and group & (group - 1) == 0


def unit_upper(h: Tensor) -> Tensor:
    """`exact_products.unit_upper`, in the same bits.

    Raises:
        RangeError: as that.
    """
    a, n = h.flip(0, 1).contiguous(), len(h)
    pivots = torch.empty(n, dtype=torch.float64, device=h.device)
    before = torch.empty(BLOCK, BLOCK, dtype=torch.float64, device=h.device)
    for start in range(0, n, BLOCK):
        count, rows = min(BLOCK, n - start), n - start
        panel, mine = a[start:, start : start + count].T.contiguous(), pivots[start : start + count]
        _launch(ELIMINATE, PANEL, (1, 1), (panel, before, mine), (rows, count), threads=BLOCK)
        if rest := rows - count:
            left, parts = a.new_empty(rest, 2 * BLOCK), a.new_empty(3 * BLOCK, rest)
            given = panel, before, mine, left, parts
            _launch(ELIMINATE_BELOW, PANEL, (-(-rest // ROWS), 1), given, (rows,))
            _subtract(a[start + count :, start + count :], left, parts, BLOCK)
        a[start:, start : start + count] = panel.T
    if not bool((pivots > 0).all()):
        raise RangeError(
            "the moments are not E[x x'] of any inputs, since they have a negative direction: sum them in fp32 or fp64"
        )
    lower = torch.tril(a, -1)
    lower.diagonal().fill_(1)
    return lower.flip(0, 1).contiguous()


class Loops(column_loops.Loops):
    """The loops over the inputs of some rows of a weight: `column_loops.Loops`, in the same bits."""

    def __init__(self, x: Tensor, z: Tensor, grid: Grid, known: DeviceMoments, tensor: float) -> None:
        super().__init__(x, z, grid, known, tensor)
        self._group = len(x) // len(z)
        self._constants = _constants(grid, self._group)
        damping = damping_of(grid, known.diagonal.cpu().numpy())
        given = [constants.LIMIT, constants.MIN_SCALE, constants.MIN_BLOCK_SCALE, tensor, known.damping, damping]
        e4m3 = rounding.e4m3_values(np.arange(127, dtype=np.uint8)).astype(np.float64)
        facts = [*given, pull_of(grid), *_tried(grid), *e4m3.tolist()]
        self._facts = torch.tensor(facts, dtype=torch.float64, device=x.device)

    def search(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `column_loops.Loops.search`."""
        rows, zeros, blocks = self._x.shape[1], self._z.clone(), self._known.blocks(self._group)
        best, by_rule, squares, units = (*(torch.empty_like(s) for _ in range(3)), torch.empty_like(self._x))
        programs = -(-rows // ROWS), len(s)

        def run(some: Tensor | None) -> None:
            given = (self._x, s, *blocks, self._known.diagonal, self._facts, some)
            _launch(SEARCH, self._constants, programs, (*given, best, self._z, units, by_rule, squares), (rows,))

        run(None)
        worse = total(squares) > total(by_rule)
        if bool(worse.any()):
            self._z.copy_(torch.where(worse, zeros, self._z))
            run(worse)
        return units, best

    def feed(self, s: Tensor) -> Tensor:
        """See `column_loops.Loops.feed`."""
        (n, rows), x, order, upper = self._x.shape, self._x, self._known.order, self._known.upper
        units, errors, top, rest = (torch.empty_like(x) for _ in range(4))
        peaks, before = x.new_empty(rows), x.new_empty(COLUMNS, rows)
        for start in range(0, n, COLUMNS):
            end = min(start + COLUMNS, n)
            if start:
                high, low = halves(upper[:start, start:end].T.contiguous(), 1)
                before = x.new_zeros(end - start, rows)
                for first in range(0, start, LONGEST):
                    of = slice(first, min(first + LONGEST, start))
                    small = (high[:, of] @ rest[of]).addmm_(low[:, of], top[of])
                    before += high[:, of] @ top[of] + small
            chunk = start // LONGEST * LONGEST
            given = x, order, s, self._z, upper, before, units, errors, top, rest, peaks
            _launch(FEED, self._constants, (-(-rows // ROWS), 1), given, (rows, n, start, end - start, chunk))
        return units

    def descend(self, units: Tensor, s: Tensor, residual: Tensor) -> bool:
        """See `column_loops.Loops.descend`."""
        (n, rows), (high, low) = units.shape, self._known.parts
        changed = torch.zeros(1, dtype=torch.int32, device=units.device)
        moved, parts = units.new_empty(WINDOW, rows), units.new_empty(3 * COLUMNS, rows)
        for start in range(0, n, WINDOW):
            end = min(start + WINDOW, n)
            r = residual[start:end].clone()
            for first in range(start, end, COLUMNS):
                after, at = min(first + COLUMNS, end), first - start
                given = (
                    units,
                    s,
                    self._z,
                    r[at:],
                    high,
                    low,
                    self._known.diagonal,
                    self._facts,
                    moved[at:],
                    parts,
                    changed,
                )
                _launch(DESCEND, self._constants, (-(-rows // ROWS), 1), given, (rows, n, first, after - first))
                if after < end:
                    left = torch.cat([high[after:end, first:after], low[after:end, first:after]], 1)
                    _subtract(r[after - start :], left, parts[: 3 * (after - first)], after - first)
            top, rest = halves(moved[: end - start], 0)
            left = torch.cat([high[:, start:end], low[:, start:end]], 1)
            window = moved, self._facts[DAMPING:], start
            _subtract(residual, left, torch.cat([top, rest, top]), end - start, window)
        return bool(changed)


def _subtract(
    a: Tensor, left: Tensor, parts: Tensor, count: int, window: tuple[Tensor, Tensor, int] | None = None
) -> None:
    """Takes the product of halves from `a`: of left [rows, 2 count], high and low, and parts [3 count, columns]; see `fit.cu`.

    Args:
        window: how far some rows moved, the damping, and the first of these rows.
    """
    high, low = left[:, :count] @ parts[:count], left @ parts[count:]
    moved, damping, start = window or (None, None, 0)
    numbers = a.stride(0), a.shape[1], start, 0 if moved is None else count
    given = a, high, low, moved, damping
    _launch(SUBTRACT, PANEL, (-(-a.shape[1] // (8 * ROWS)), len(a)), given, numbers)


def _launch(
    kernel: nvrtc.Kernel, given: tuple[tuple[str, int], ...], programs: tuple[int, int], tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, ...], *, threads: int = ROWS,
) -> None:  # fmt: skip
    first = tensors[0]
    assert first is not None
    with device_of(first):
        kernel(given, programs, threads, (*(0 if one is None else one.data_ptr() for one in tensors), *numbers))


def _constants(grid: Grid, group: int) -> tuple[tuple[str, int], ...]:
    element = grid.element
    integer = element.kind == "integer"
    return (
        ("GROUP", group),
        ("RULE", RULES.get(grid.scale, 0 if integer else 4)),
        ("LOWEST", element.lowest if integer else 0),
        ("HIGHEST", (element.highest if grid.symmetric else element.levels) if integer else 0),
        ("MANTISSA", 0 if integer else element.mantissa),
        ("LEAST", 0 if integer else element.min_exponent),
        ("EIGHTHS", 0 if integer else int(8 * element.largest)),
        ("MOST", 0 if integer else element.max_exponent),
        ("LEAST_POWER", constants.MIN_SCALE_CODE - 127),
        ("MOST_POWER", constants.MAX_SCALE_CODE - 127),
    )


def _tried(grid: Grid) -> list[float]:
    """Scales of integers to try, over the largest value of a cell; over its ends, where there are zero points."""
    if grid.element.kind == "float":
        return [0.0] * STEPS
    least = LEAST.get(grid.element.bits, LEAST_OF_WIDE)
    tried = [least + step * ((MOST - least) / (STEPS - 1)) for step in range(STEPS)]
    return tried if grid.scale == "minmax" else [f / -grid.element.lowest for f in tried]
