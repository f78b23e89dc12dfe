"""Launches of the kernels of `fit.cu` and the files beside it: the loops of `arithmetic.fitting` on a GPU, in the law's bits.

Products over many inputs are of digits or torch's: their terms are exact, in any order, see `qkit.reference.products`. Rows of a
weight lie one after the other in memory, and tensors [inputs, rows] are views of them.
"""

import numpy as np
import torch
from torch import Tensor

from qkit import element as constants
from qkit.grid import Grid
from qkit.reference import rounding
from qkit.reference.fitting import COLUMNS, WINDOW
from qkit.reference.objectives import damping_of, pull_of
from qkit.reference.products import BITS, LONGEST
from qkit.reference.steps import LEAST, LEAST_OF_WIDE, MOST, STEPS
from qkit_torchao.arithmetic import column_loops, exact_products
from qkit_torchao.arithmetic.exact_products import shortened, total
from qkit_torchao.arithmetic.moments import DeviceMoments
from qkit_torchao.kernels import cuda_digits, nvrtc
from qkit_torchao.kernels.fit_launches import EXACT, ROWS, THREADS, launch
from qkit_torchao.kernels.nvrtc import NUMBER, POINTER

DEEP = 256  #: rows of a matrix that a thread of `find_powers` reads
WARP = 32  #: threads of a team, at most
SHORTEST = 16  #: the shortest group that a team takes; the longest is a window
WIDEST_SIFTED = 32  #: inputs of a group that a thread of `sift` takes
RULES = {"signed": 1, "minmax": 2, "nvfp4": 3}  #: by number, as `fit.cu` has them: 0 other integers, 4 other floats
UNIT = 2.0 ** (1 - BITS)  #: of digits of correlations
DAMPING = 4  #: its place among the facts
SURE = 0.999  #: of an error: a bound below is below it in every rounding

SIFT = nvrtc.Kernel("sift.cu", "sift", (POINTER,) * 6 + (NUMBER,) * 2, options=EXACT)
SEARCH = nvrtc.Kernel("fit.cu", "search", (POINTER,) * 12 + (NUMBER,) * 2, options=EXACT)
FEED = nvrtc.Kernel("feed.cu", "feed", (POINTER,) * 11 + (NUMBER,) * 6, options=EXACT)
FIND_POWERS = nvrtc.Kernel("feed.cu", "find_powers", (POINTER,) * 2 + (NUMBER,) * 3, options=EXACT)
SHORTEN_ABOVE = nvrtc.Kernel("feed.cu", "shorten_above", (POINTER,) * 3 + (NUMBER,) * 3, options=EXACT)
DESCEND = nvrtc.Kernel("fit.cu", "descend", (POINTER,) * 11 + (NUMBER,) * 5, options=EXACT)
DIGITS = nvrtc.Kernel("fit.cu", "digits", (POINTER,) * 4 + (NUMBER,) * 3, options=EXACT)
WEIGH = nvrtc.Kernel("fit.cu", "weigh", (POINTER,) * 5 + (NUMBER,) * 3, options=EXACT)
DIFFER = nvrtc.Kernel("fit.cu", "differ", (POINTER,) * 4 + (NUMBER,), options=EXACT)
SUBTRACT = nvrtc.Kernel("fit.cu", "subtract", (POINTER,) * 3 + (NUMBER,) * 2, options=EXACT)


def takes(grid: Grid, inputs: int) -> bool:
    """Whether the kernels take rows of this many inputs on `grid`."""
    group = grid.group_shape((1, inputs))[-1]
    return SHORTEST <= group <= COLUMNS and group & (group - 1) == 0


class Loops(column_loops.Loops):
    """The loops over the inputs of some rows of a weight: `column_loops.Loops`, in the same bits."""

    def __init__(self, x: Tensor, z: Tensor, grid: Grid, known: DeviceMoments, tensor: float) -> None:
        super().__init__(x, z, grid, known, tensor)
        (n, self._rows), self._groups = x.shape, len(z)
        self._group = n // len(z)
        self._constants = _constants(grid, self._group)
        damping = self._search_damping = damping_of(grid, known.diagonal.cpu().numpy())
        self._sifts = grid.element.kind == "integer" and grid.symmetric and self._group <= WIDEST_SIFTED
        given = [constants.LIMIT, constants.MIN_SCALE, constants.MIN_BLOCK_SCALE, tensor, known.damping, damping]
        e4m3 = rounding.e4m3_values(np.arange(127, dtype=np.uint8)).astype(np.float64)
        facts = [*given, pull_of(grid), *_tried(grid), *e4m3.tolist()]
        self._late: list[tuple[int, Tensor]] = []  # moves of the last round that the residual lacks in part
        self._dampings = torch.full((WINDOW,), known.damping, dtype=torch.float64, device=x.device)
        self._facts = torch.tensor(facts, dtype=torch.float64, device=x.device)

    @staticmethod
    def laid(a: Tensor) -> Tensor:
        """See `column_loops.Loops.laid`."""
        return a.contiguous().double().T

    def search(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `column_loops.Loops.search`."""
        zeros, blocks = self._z.clone(), self._known.blocks(self._group).transpose(1, 2).contiguous()
        best, by_rule, squares, units = (*(torch.empty_like(s) for _ in range(3)), torch.empty_like(self._x))

        def run(some: Tensor | None, worth: Tensor | None) -> None:
            given = (
                self._x,
                s,
                blocks,
                self._known.diagonal,
                self._facts,
                some,
                worth,
                best,
                self._z,
                units,
                by_rule,
                squares,
            )
            self._launch(SEARCH, given, (self._rows, self._groups), programs=self._groups)

        run(None, self._sift(s, blocks) if self._sifts else None)
        worse = total(squares) > total(by_rule)
        if bool(worse.any()):
            self._z.copy_(torch.where(worse, zeros, self._z))
            run(worse, None)
        return units, best

    def _sift(self, s: Tensor, blocks: Tensor) -> Tensor:
        """int64 [rows, groups]: a bit for each scale that `search` has to try; see `sift.cu`."""
        own = blocks.diagonal(dim1=1, dim2=2)
        sizes = own.abs() + (self._known.damping + self._search_damping)
        peaks = sizes.amax(1, keepdim=True)
        unit = exact_products.power(-torch.frexp(peaks).exponent)
        both = (blocks + blocks.transpose(1, 2)).tril(-1)
        both.diagonal(dim1=1, dim2=2).copy_(own + self._search_damping)
        roots = (sizes * unit).sqrt_().mul_(1.001).float()  # fp32 rounds up to a half of 2^-23
        worth = torch.empty(self._rows, self._groups, dtype=torch.int64, device=s.device)
        given = (self._x, s, (both * unit[:, :, None]).float(), roots, self._facts, worth)
        launch(
            SIFT,
            self._constants,
            (-(-self._rows // ROWS), self._groups),
            given,
            (self._rows, self._groups),
            threads=ROWS,
        )
        return worth

    def feed(self, s: Tensor) -> Tensor:
        """See `column_loops.Loops.feed`."""
        (n, rows), x, known = self._x.shape, self._x, self._known
        units, errors, parts = (torch.empty_like(x) for _ in range(3))
        peaks = torch.empty(rows, dtype=torch.int32, device=x.device)
        for begin in range(0, n, WINDOW):
            stop = min(begin + WINDOW, n)
            above, before = _shortened_above(known.upper, begin, stop), None
            for first in range(0, begin, WINDOW):
                of = slice(first, first + WINDOW)
                part = parts[of].T @ above[of]
                before = part if before is None else before.add_(part)
            for start in range(begin, stop, COLUMNS):
                count, of = min(COLUMNS, stop - start), slice(begin, start)
                more = parts[of].T @ above[of, start - begin : start - begin + count] if start > begin else None
                given = x, known.order, s, self._z, known.upper, before, more, units, errors, parts, peaks
                numbers = rows, n, start, count, begin, stop - begin
                self._launch(FEED, given, numbers)
        return units

    def descend(self, units: Tensor, s: Tensor, residual: Tensor, *, last: bool) -> bool:
        """See `column_loops.Loops.descend`."""
        (n, rows), known, r = units.shape, self._known, residual.T
        changed = torch.zeros(1, dtype=torch.int32, device=units.device)
        parts = r.new_empty(rows, COLUMNS)
        for start in range(0, n, WINDOW):
            end = min(start + WINDOW, n)
            left, moved = r[:, start:end].clone(), r.new_empty(rows, end - start)
            for first in range(start, end, COLUMNS):
                after, at = min(first + COLUMNS, end), first - start
                given = (units, s, self._z, left[:, at:], known.correlations, known.sizes, known.diagonal, self._facts)
                numbers = rows, n, end - start, first, after - first
                self._launch(DESCEND, (*given, moved[:, at:], parts, changed), numbers)
                if after < end:
                    by = parts[:, : after - first] @ known.correlations[first:after, after:end]
                    _subtract(left[:, after - start :], by, known.sizes[after:end])
            if last:  # of the inputs before, no loop reads the residual again
                self._late.append((start, moved))
            self._update(r, moved, start, slice(end if last else 0, None))
        return bool(changed)

    def differ(self, units: Tensor, s: Tensor) -> Tensor:
        """See `column_loops.Loops.differ`."""
        found, (n, rows) = torch.empty_like(units), units.shape
        programs = -(-n // (4 * THREADS)), rows
        launch(DIFFER, self._constants, programs, (self._x, units, s, found), (n,))
        return found

    def times(self, d: Tensor) -> Tensor:
        """See `column_loops.Loops.times`."""
        if self._known.digits is None:
            return super().times(d)
        found = torch.zeros_like(d)
        for start in range(0, len(d), LONGEST):
            self._take(found.T, d[start : start + LONGEST].T, start, self._known.digits, self._known.sizes, -1)
        return found

    def weigh(self, d: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        """See `column_loops.Loops.weigh`."""
        return self._sums(d, product, 1)

    def exceeds(self, allowed: Tensor, units: Tensor, s: Tensor, residual: Tensor, *, begun: Tensor) -> Tensor:
        """See `column_loops.Loops.exceeds`."""
        d, late = self.differ(units, s), self._late
        self._late = []
        if not late:
            return self.error(d, residual) > allowed
        most, found = begun - self._known.damping * (d * d).sum(0), torch.zeros_like(allowed, dtype=torch.bool)
        unsure = (~(most <= SURE * allowed)).nonzero()[:, 0]
        if len(unsure):
            own, r = d.T[unsure].T, residual.T[unsure]
            for start, moved in late:
                self._update(r, moved[unsure], start, slice(0, start + moved.shape[1]))
            found[unsure] = self.error(own, r.T) > allowed[unsure]
        return found

    def error(self, d: Tensor, residual: Tensor) -> Tensor:
        """See `column_loops.Loops.error`."""
        return self._sums(d, residual, 0)[1]

    def _update(self, r: Tensor, moved: Tensor, start: int, of: slice) -> None:
        """Takes (H + damping) moved from some inputs of the residual r [rows, inputs]; moved [rows, count] begins at `start`."""
        known, end = self._known, start + moved.shape[1]
        if known.digits is not None:
            self._take(r[:, of], moved, start, known.digits[:, of], known.sizes[of], 1)
        else:
            by = shortened(known.sizes[start:end] * moved, 1) @ known.correlations[start:end, of]
            _subtract(r[:, of], by, known.sizes[of])
        if of.start <= start:
            _subtract(r[:, start:end], moved, self._dampings)

    def _sums(self, d: Tensor, residual: Tensor, add: int) -> tuple[Tensor, Tensor]:
        n, rows = d.shape
        whole, plain = d.new_empty(2, rows)
        self._launch(WEIGH, (d, residual, self._facts[DAMPING:], whole, plain), (rows, n, add))
        return whole, plain

    def _take(self, out: Tensor, d: Tensor, start: int, digits: Tensor, sizes: Tensor, factor: int) -> None:
        """Takes factor * H d from `out`, whose inputs have `digits` and `sizes`; d [rows, count] begins at the input `start`."""
        (rows, count), found = d.shape, torch.empty(3, *d.shape, dtype=torch.int8, device=d.device)
        units = d.new_empty(rows)
        self._launch(DIGITS, (d, self._known.sizes[start:], found, units), (rows, d.stride(0), count))
        cuda_digits.subtract_product(out, found, units.mul_(factor * UNIT), digits[:, :, start : start + count], sizes)

    def _launch(
        self, kernel: nvrtc.Kernel, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...], *, programs: int = 1
    ) -> None:
        """Launches programs of teams, one for each of as many rows as the first number says."""
        teams = THREADS // min(self._group, WARP)
        launch(kernel, self._constants, (-(-numbers[0] // teams), programs), tensors, numbers)


def _shortened_above(upper: Tensor, begin: int, stop: int) -> Tensor:
    """Columns of `upper` [inputs, inputs], each shortened over the rows above its own `COLUMNS`; other rows are not filled."""
    count, n = stop - begin, len(upper)
    powers = torch.zeros(count, dtype=torch.int32, device=upper.device)
    found, across = upper.new_empty(stop, count), -(-count // THREADS)
    launch(FIND_POWERS, NEUTRAL, (across, -(-stop // DEEP)), (upper, powers), (n, begin, count))
    launch(SHORTEN_ABOVE, NEUTRAL, (across, stop), (upper, powers, found), (n, begin, count))
    return found


def _subtract(a: Tensor, by: Tensor, sizes: Tensor) -> None:
    """Takes sizes * by [rows, columns] from `a`."""
    if a.shape[1]:
        launch(SUBTRACT, NEUTRAL, (-(-a.shape[1] // (4 * THREADS)), len(a)), (a, by, sizes), (a.stride(0), a.shape[1]))


def _constants(grid: Grid, group: int) -> tuple[tuple[str, int], ...]:
    element = grid.element
    integer = element.kind == "integer"
    return (
        ("GROUP", group),
        ("LANES", min(group, WARP)),
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


NEUTRAL = _constants(Grid("int4", WARP), WARP)  #: for a kernel that no grid changes
