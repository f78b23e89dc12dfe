"""The law of fitted codes: scales and codes that lose less than the rule's, on the same grid and in the same bytes.

`search` tries scales around the rule's, and keeps the one of least error, by the moments of a group's inputs where they are
known; see `objectives`. `solve` starts there, and chooses codes by the second moments of all inputs, H = E[x x'], so that the
error of one weight makes up for that of others: first by the feedback of GPTQ (https://arxiv.org/abs/2210.17323, in the form of
QuIP, https://arxiv.org/abs/2307.13304), then by rounds of descent: each scale and code takes its best value given all others.

Arithmetic is fp64, elementwise or by `products`, so that the same arguments give the same codes on every machine. Arrays lie on
their side: inputs along the first axis, rows of the weight along the last. No row sees another.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qkit.errors import GridError
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit.reference import rounding
from qkit.reference.moments import Moments, mean_squares
from qkit.reference.objectives import Objective, blocks_of, objective
from qkit.reference.products import Doubles, product, shortened, total
from qkit.reference.steps import candidates, nearest, steps_of, storable, stored, want_fitted

Method = Literal["search", "solve"]
ROUNDS = 3  #: of descent, at most
REFITS = 2  #: of scales, to the codes that `search` found
SHARE = 1 << 17  #: values of a weight that are fitted at once
COLUMNS = 128  #: inputs that change before others of their window are updated
WINDOW = 1024  #: inputs that change before all others are updated


def fit(
    w: NDArray[Any],
    grid: Grid,
    moments: NDArray[Any] | Moments | None = None,
    *,
    method: Method = "search",
    peak: float | None = None,
    rounds: int = ROUNDS,
) -> QTensor[NDArray[Any]]:
    """Fitted codes and scales of finite `w` [..., n], float32, bfloat16 or float16; every reader takes them as `quantize`'s.

    The error of a row is d H d', where d is the row less its values. Row by row, that of `search` is at most the rule's in the
    diagonal of H, and that of `solve` at most that of `search` in H.

    Args:
        moments: E[x x'] [n, n] of the layer's inputs. `search` takes its diagonal [n], too; or None: all inputs weigh the same.
        peak: as for `quantize`.
        rounds: of descent, at most. Each lowers the error in the damped H.

    Raises:
        GridError: scales on `grid` follow from no rule; no such method; moments that are missing or of another shape.
        RangeError: moments with a NaN or an infinity, of zeros only, or that no inputs have.
    """
    if method not in get_args(Method):
        raise GridError(f"no method {method!r} of fitting: choose one of {', '.join(get_args(Method))}")
    want_fitted(grid)
    first = rounding.quantize(w, grid, peak=peak)
    flat = w.reshape(-1, w.shape[-1]).astype(np.float64)
    mean_squares(moments, flat.shape[1])  # refuses bad ones before any work
    blocks = blocks_of(moments, flat.shape[1], grid)
    known = Moments.of(moments) if method == "solve" and not isinstance(moments, Moments) else moments
    tensor = 1.0 if first.tensor_scale is None else float(first.tensor_scale)
    s, z = (a.reshape(-1) for a in steps_of(first))
    shape = first.scales.shape
    units = np.empty(flat.shape)
    for rows, of in _shares(flat.shape, grid):
        x = flat[rows]
        aim = objective(moments, x, grid, blocks)
        found, s[of], z[of] = _search_rows(s[of], z[of], grid, aim, tensor, len(x))
        units[rows] = found.T.reshape(x.shape)
        if method == "solve":
            assert isinstance(known, Moments)
            on_side = x.T.copy(), units[rows].T.copy()
            found, steps = solve(*on_side, *_steps(s[of], z[of], on_side[0], grid), known, grid, tensor, rounds)
            units[rows] = found.T
            if grid.group != "tensor":
                s[of] = steps.T.reshape(-1)
    of_all = units.reshape(w.shape)
    return stored(of_all, s.reshape(shape), z.reshape(shape), grid, first.tensor_scale, dtype_of(w))


def _search_rows(
    s: Doubles, z: Doubles, grid: Grid, aim: Objective, tensor: float, rows: int
) -> tuple[Doubles, Doubles, Doubles]:
    """As `search`, for the cells of `rows` rows; in a row whose squares would rise above the rule's, those of no cell rise."""
    x, found = aim.x, search(s, z, grid, aim=aim, tensor=tensor)
    by_rule = aim.squares(nearest(x / s, z, grid) * s - x)

    def of_rows(squares: Doubles) -> Doubles:
        return total(squares.reshape(rows if s.size > 1 else 1, -1).T)

    worse = of_rows(aim.squares(found[0] * found[1] - x)) > of_rows(by_rule)
    if worse.any():
        some = np.repeat(worse, s.size // worse.size)
        mine = Objective(x[:, some], aim.weights[:, some], aim.blocks, aim.damping, aim.pull)
        again = search(s[some], z[some], grid, aim=mine, tensor=tensor, most=by_rule[some])
        for all_of_them, better in zip(found, again, strict=True):
            all_of_them[..., some] = better
    return found


def search(
    s: Doubles, z: Doubles, grid: Grid, *, aim: Objective, tensor: float, most: Doubles | None = None
) -> tuple[Doubles, Doubles, Doubles]:
    """The units [group, cells] on the scales of least error, these scales, and their zero points.

    Args:
        s, z: the rule's, [cells].
        aim: the error to lower, with the values of the cells.
        tensor: NVFP4's scale of the tensor, else 1.
        most: squares [cells] that no scale may exceed.
    """
    x = aim.x
    best = [nearest(x / s, z, grid), s, z]
    least = aim.error(best[0] * s - x)

    def keep_better(s: Doubles, z: Doubles) -> None:
        units = nearest(x / s, z, grid)
        error = aim.error(units * s - x)
        better = error < least
        if most is not None:
            better &= aim.squares(units * s - x) <= most
        np.copyto(least, error, where=better)
        best[:] = (np.where(better, new, old) for new, old in zip((units, s, z), best, strict=True))

    for tried in candidates(x, s, grid, tensor):
        keep_better(*tried)
    for _ in range(REFITS):
        units, s, z = best
        keep_better(_refit(*aim.quotient(units), s, grid, tensor), z)
    return best[0], best[1], best[2]


def solve(
    x: Doubles,
    units: Doubles,
    s: Doubles,
    z: Doubles,
    known: Moments,
    grid: Grid,
    tensor: float,
    rounds: int,
) -> tuple[Doubles, Doubles]:
    """The units [n, rows] and scales [groups, rows] for rows `x` [n, rows], from those of `search`."""
    at = np.arange(len(x)) // (len(x) // len(s))
    fed = _feed(x, s, z, known, grid)
    errors, searched = x - fed * s[at], x - units * s[at]
    residual, before = (known.times(d) + known.damping * d for d in (errors, searched))
    closer = total(errors * residual) < total(searched * before)
    v, new = np.where(closer, fed, units), s.copy()
    residual = np.where(closer, residual, before)
    for _ in range(rounds):
        if not _descend(v, new, z, residual, known, grid, tensor):
            break
    errors = x - v * new[at]
    worse = _error(errors, residual, known) > _error(searched, before, known)
    return np.where(worse, units, v), np.where(worse, s, new)


def _feed(x: Doubles, s: Doubles, z: Doubles, known: Moments, grid: Grid) -> Doubles:
    """Units of each input in turn, nearest to its weight plus the errors of those before, as H wants them made up for."""
    n, order = len(x), known.order
    at, x = order // (n // len(s)), x[order]
    errors, units = np.zeros(x.shape), np.empty(x.shape)
    for start in range(0, n, COLUMNS):
        end = min(start + COLUMNS, n)
        wanted = (
            x[start:end] + product(shortened(known.upper[:start, start:end].T, axis=1), errors[:start], terms=WINDOW)
            if start
            else x[:end].copy()
        )
        for j in range(start, end):
            step = s[at[j]]
            units[j] = nearest(wanted[j - start] / step, z[at[j]], grid)
            errors[j] = x[j] - units[j] * step
            wanted[j - start + 1 :] += known.upper[j, j + 1 : end, None] * errors[j]
    back = np.empty(x.shape)
    back[order] = units
    return back


def _descend(
    units: Doubles, s: Doubles, z: Doubles, residual: Doubles, known: Moments, grid: Grid, tensor: float
) -> bool:
    """One round over groups and inputs, in place: each takes the value of least error. Returns whether any changed.

    Args:
        residual: (H + damping) (x - values), [n, rows].
    """
    n, group, changed = len(units), len(units) // len(s), False
    for start in range(0, n, width := max(group, WINDOW // group * group)):
        window = slice(start, min(start + width, n))
        moved = _descend_window(units, s, z, residual[window].copy(), window, known, grid, tensor)
        if moved.any():
            residual -= known.times(moved, inputs=window)
            residual[window] -= known.damping * moved
            changed = True
    return changed


def _descend_window(
    units: Doubles, s: Doubles, z: Doubles, r: Doubles, window: slice, known: Moments, grid: Grid, tensor: float
) -> Doubles:
    """Moves the scales and units of a window, whose residual is `r` [inputs, rows]; returns how far its values moved."""
    group, moved = len(units) // len(s), np.zeros(r.shape)
    for first in range(0, len(r), width := max(group, COLUMNS // group * group)):
        part = slice(first, min(first + width, len(r)))
        own = r[part].copy()
        for at in range(0, len(own), group):
            here, after = slice(at, at + group), slice(at + group, None)
            begin = window.start + first + at
            place = slice(begin, begin + group)
            of_group = units[place], s[begin // group], z[begin // group]
            move = _rescale(*of_group[:2], own[here], known, place, grid, tensor)
            move += _recode(*of_group, own[here], known, place, grid)
            moved[first + at : first + at + group] = move
            if len(own[after]):
                beyond = slice(place.stop, window.start + part.stop)
                own[after] -= known.times(move, beyond, place)
        if part.stop < len(r):
            beyond, mine = (
                slice(window.start + a, window.start + b) for a, b in ((part.stop, len(r)), (first, part.stop))
            )
            r[part.stop :] -= known.times(moved[part], beyond, mine)
    return moved


def _rescale(
    units: Doubles, s: Doubles, r: Doubles, known: Moments, place: slice, grid: Grid, tensor: float
) -> Doubles:
    """Moves the scales `s` [rows] of a group to their best, and its residual `r` with them; returns how far its values moved."""
    if grid.group == "tensor":  # all rows have this scale
        return np.zeros(units.shape)
    curvature = total(units * (known.times(units, place, place) + known.damping * units))
    new = _refit(curvature * s + total(units * r), curvature, s, grid, tensor)
    moved = units * (new - s)
    r -= known.times(moved, place, place) + known.damping * moved
    s[:] = new
    return moved


def _recode(units: Doubles, s: Doubles, z: Doubles, r: Doubles, known: Moments, place: slice, grid: Grid) -> Doubles:
    """Moves the units of a group to their best one after the other; returns how far its values moved."""
    moved, sizes = np.zeros(units.shape), known.sizes[place]
    inverse = 1.0 / ((known.diagonal[place] + known.damping)[:, None] * s)
    for start in range(0, len(units), COLUMNS):
        end = min(start + COLUMNS, len(units))
        here, after = (slice(place.start + at, place.start + stop) for at, stop in ((start, end), (end, len(units))))
        h = known.correlations[here, here] * sizes[start:end, None] * sizes[start:end]
        for j in range(start, end):
            new = nearest(units[j] + r[j] * inverse[j], z, grid)
            moved[j] = (new - units[j]) * s
            units[j] = new
            r[j + 1 : end] -= h[j - start + 1 :, j - start, None] * moved[j]
        if end < len(units):
            r[end:] -= known.times(moved[start:end], after, here)
    return moved


def _refit(numerator: Doubles, denominator: Doubles, s: Doubles, grid: Grid, tensor: float) -> Doubles:
    """The storable scales nearest to the quotients, which are the best for given codes; `s` for cells of zeros."""
    wanted = np.divide(numerator, denominator, out=s.copy(), where=denominator > 0)
    return storable(wanted, s, grid, tensor)


def _error(d: Doubles, residual: Doubles, known: Moments) -> Doubles:
    """d' H d of the columns of `d` [n, rows], whose product with the damped H is `residual`."""
    return total(d * (residual - known.damping * d))


def _steps(s: Doubles, z: Doubles, x: Doubles, grid: Grid) -> tuple[Doubles, Doubles]:
    """Scales and zero points of cells as [groups, rows], for `x` [n, rows]."""
    if grid.group == "tensor":
        return np.broadcast_to(s, (1, x.shape[1])), np.broadcast_to(z, (1, x.shape[1]))
    return s.reshape(x.shape[1], -1).T, z.reshape(x.shape[1], -1).T


def _shares(shape: tuple[int, ...], grid: Grid) -> Iterator[tuple[slice, slice]]:
    """Rows to fit at once, and their cells; all rows where they share a scale."""
    rows, n = shape
    many = rows if grid.group == "tensor" else max(SHARE // n, 1)
    cells = 1 if grid.group == "tensor" else math.prod(grid.scale_shape((many, n)))
    for number, start in enumerate(range(0, rows, many)):
        yield slice(start, min(start + many, rows)), slice(number * cells, (number + 1) * cells)
