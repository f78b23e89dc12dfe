"""The loops over the inputs of a weight, of the law of fitted codes, on a torch device: one column after the other.

`kernels.cuda_fit` has the same loops, in the same bits, for GPUs.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from qkit import element as constants
from qkit.element import Element
from qkit.grid import Grid
from qkit.reference import rounding
from qkit.reference.fitting import COLUMNS, REFITS, WINDOW
from qkit.reference.objectives import WIDEST, damping_of, pull_of
from qkit.reference.steps import BLOCK_CODES, LEAST, LEAST_OF_WIDE, MOST, STEPS
from qkit_torchao.arithmetic import exact_products
from qkit_torchao.arithmetic.moments import DeviceMoments

E4M3 = Element("e4m3", "float", 8, 448.0, mantissa=3, min_exponent=-6)


class Loops:
    """The loops over the inputs of some rows of a weight.

    Args:
        x: the rows on their side, [inputs, rows].
        z: zero points [groups, rows].
        tensor: NVFP4's scale of the tensor, else 1.
    """

    def __init__(self, x: Tensor, z: Tensor, grid: Grid, known: DeviceMoments, tensor: float) -> None:
        self._x, self._z, self._grid, self._known, self._tensor = x, z, grid, known, tensor

    @staticmethod
    def laid(a: Tensor) -> Tensor:
        """Rows of numbers on their side, in fp64, as these loops store them."""
        return a.T.double().contiguous()

    def search(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Units [inputs, rows] and scales [groups, rows] of least error, from the rule's scales `s`."""
        rows, group = self._x.shape[1], len(self._x) // len(s)
        cells = self._x.T.reshape(-1, group).T.contiguous()
        shape = torch.Size((rows, len(self._x)))
        rule, zeros = (a.T.reshape(-1) for a in (s, self._z))
        units, found = _search(cells, rule, zeros, self._grid, self._known, self._tensor, shape)
        return units.T.reshape(shape).T.contiguous(), found.reshape(rows, -1).T.contiguous()

    def feed(self, s: Tensor) -> Tensor:
        """Units [inputs, rows], each nearest to its weight plus the errors of those before, on scales `s`."""
        return _feed(self._x, s, self._z, self._known, self._grid)

    def differ(self, units: Tensor, s: Tensor) -> Tensor:
        """The rows less the values of units [inputs, rows] on scales `s` [groups, rows]."""
        group = len(self._x) // len(s)
        return self._x - (units.reshape(len(s), group, -1) * s[:, None]).reshape(units.shape)

    def times(self, d: Tensor) -> Tensor:
        """H d, of d [inputs, rows]."""
        return self._known.times(d)

    def weigh(self, d: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        """Makes of the product H d the one of the damped H; returns d' (H + damping) d and d' H d of each row."""
        product += self._known.damping * d
        return exact_products.total(d * product), self.error(d, product)

    def exceeds(self, allowed: Tensor, units: Tensor, s: Tensor, residual: Tensor, *, begun: Tensor) -> Tensor:
        """Whether d' H d of each row is more than `allowed`.

        Args:
            residual: as `descend` leaves it.
            begun: d' (H + damping) d before the first round: no round makes it larger.
        """
        return self.error(self.differ(units, s), residual) > allowed

    def error(self, d: Tensor, residual: Tensor) -> Tensor:
        """d' H d of each row, from the product of the damped H."""
        return exact_products.total(d * (residual - self._known.damping * d))

    def descend(self, units: Tensor, s: Tensor, residual: Tensor, *, last: bool) -> bool:
        """One round over groups and inputs, in place: each takes the value of least error. Returns whether any changed.

        Args:
            residual: (H + damping) (x - values), [inputs, rows].
            last: whether only `exceeds` reads the residual afterwards.
        """
        return _descend(units, s, self._z, residual, self._known, self._grid, self._tensor)


def _search(
    x: Tensor, s: Tensor, z: Tensor, grid: Grid, known: DeviceMoments, tensor: float, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """Units of cells [group, cells], and their scales."""
    rows, n = shape
    group = len(x)
    weights = known.diagonal.expand(rows, n).reshape(-1, group).T.contiguous()
    blocks = None
    if group <= WIDEST:
        blocks = known.blocks(group)
    damping = damping_of(grid, known.diagonal.cpu().numpy())

    def times(d: Tensor) -> Tensor:
        if blocks is None:
            return weights * d + damping * d
        by_group = d.reshape(group, -1, len(blocks)).permute(2, 0, 1).contiguous()
        found = blocks @ exact_products.shortened(by_group, 1)
        return found.permute(1, 2, 0).reshape(d.shape) + damping * d

    along, pull = times(x), pull_of(grid)
    size = (found := exact_products.total(x * along)).where(found > 0, 1.0)

    def squares(d: Tensor) -> Tensor:
        return exact_products.total(weights * d * d)

    def error(d: Tensor) -> Tensor:
        part = exact_products.total(d * along)
        return exact_products.total(d * times(d)) + pull * (part * part / size)

    def run(most: Tensor | None) -> tuple[Tensor, Tensor]:
        best = [_nearest(x / s, z, grid), s.clone()]
        least = error(best[0] * s - x)

        def keep(tried: Tensor) -> None:
            nonlocal least
            units = _nearest(x / tried, z, grid)
            d = units * tried - x
            found = error(d)
            better = found < least if most is None else (found < least) & (squares(d) <= most)
            least = torch.where(better, found, least)
            best[:] = [torch.where(better, new, old) for new, old in zip((units, tried), best, strict=True)]

        for tried in _candidates(x, s, grid, tensor):
            keep(tried)
        for _ in range(REFITS):
            units, scale = best
            part = exact_products.total(units * along)
            own = exact_products.total(units * times(units)) + pull * (part * part / size)
            keep(_refit((1 + pull) * part, own, scale, grid, tensor))
        return best[0], best[1]

    def by_rows(of_cells: Tensor) -> Tensor:
        return exact_products.total(of_cells.reshape(rows, -1).T.contiguous())

    units, found = run(None)
    by_rule = squares(_nearest(x / s, z, grid) * s - x)
    worse = by_rows(squares(units * found - x)) > by_rows(by_rule)
    if bool(worse.any()):
        again, some = run(by_rule), worse.repeat_interleave(n // group)
        units, found = (torch.where(some, new, old) for new, old in zip(again, (units, found), strict=True))
    return units, found


def _feed(x: Tensor, s: Tensor, z: Tensor, known: DeviceMoments, grid: Grid) -> Tensor:
    n, order = len(x), known.order
    places, x = (order // (n // len(s))).tolist(), x[order]
    errors, units = torch.zeros_like(x), torch.empty_like(x)
    for start in range(0, n, COLUMNS):
        end = min(start + COLUMNS, n)
        wanted = x[start:end].clone()
        if start:
            before = exact_products.shortened(known.upper[:start, start:end].T, 1)
            wanted += exact_products.product(before, errors[:start], terms=WINDOW)
        for j in range(start, end):
            step = s[places[j]]
            units[j] = _nearest(wanted[j - start] / step, z[places[j]], grid)
            errors[j] = x[j] - units[j] * step
            wanted[j - start + 1 :] += known.upper[j, j + 1 : end, None] * errors[j]
    back = torch.empty_like(x)
    back[order] = units
    return back


def _descend(
    units: Tensor, s: Tensor, z: Tensor, residual: Tensor, known: DeviceMoments, grid: Grid, tensor: float
) -> bool:
    n, group, changed = len(units), len(units) // len(s), False
    for start in range(0, n, width := max(group, WINDOW // group * group)):
        window = slice(start, min(start + width, n))
        moved = _descend_window(units, s, z, residual[window].clone(), window, known, grid, tensor)
        if bool(moved.any()):
            residual -= known.times(moved, inputs=window)
            residual[window] -= known.damping * moved
            changed = True
    return changed


def _descend_window(
    units: Tensor, s: Tensor, z: Tensor, r: Tensor, window: slice, known: DeviceMoments, grid: Grid, tensor: float
) -> Tensor:
    group, moved = len(units) // len(s), torch.zeros_like(r)
    for first in range(0, len(r), width := max(group, COLUMNS // group * group)):
        part = slice(first, min(first + width, len(r)))
        own = r[part].clone()
        for at in range(0, len(own), group):
            here, begin = slice(at, at + group), window.start + first + at
            place, mine = slice(begin, begin + group), begin // group
            move = _rescale(units[place], s[mine], own[here], known, place, grid, tensor)
            move += _recode(units[place], s[mine], z[mine], own[here], known, place, grid)
            moved[first + at : first + at + group] = move
            if at + group < len(own):
                beyond = slice(place.stop, window.start + part.stop)
                own[at + group :] -= known.times(move, beyond, place)
        if part.stop < len(r):
            beyond, done = (
                slice(window.start + a, window.start + b) for a, b in ((part.stop, len(r)), (first, part.stop))
            )
            r[part.stop :] -= known.times(moved[part], beyond, done)
    return moved


def _rescale(
    units: Tensor, s: Tensor, r: Tensor, known: DeviceMoments, place: slice, grid: Grid, tensor: float
) -> Tensor:
    curvature = exact_products.total(units * (known.times(units, place, place) + known.damping * units))
    new = _refit(curvature * s + exact_products.total(units * r), curvature, s, grid, tensor)
    moved = units * (new - s)
    r -= known.times(moved, place, place) + known.damping * moved
    s.copy_(new)
    return moved


def _recode(units: Tensor, s: Tensor, z: Tensor, r: Tensor, known: DeviceMoments, place: slice, grid: Grid) -> Tensor:
    moved, sizes = torch.zeros_like(units), known.sizes[place]
    inverse = 1.0 / ((known.diagonal[place] + known.damping)[:, None] * s)
    for start in range(0, len(units), COLUMNS):
        end = min(start + COLUMNS, len(units))
        here, after = (slice(place.start + at, place.start + stop) for at, stop in ((start, end), (end, len(units))))
        h = known.correlations[here, here] * sizes[start:end, None] * sizes[start:end]
        for j in range(start, end):
            new = _nearest(units[j] + r[j] * inverse[j], z, grid)
            moved[j] = (new - units[j]) * s
            units[j] = new
            r[j + 1 : end] -= h[j - start + 1 :, j - start, None] * moved[j]
        if end < len(units):
            r[end:] -= known.times(moved[start:end], after, here)
    return moved


def _refit(numerator: Tensor, denominator: Tensor, s: Tensor, grid: Grid, tensor: float) -> Tensor:
    return _storable(torch.where(denominator > 0, numerator / denominator, s), s, grid, tensor)


def _candidates(x: Tensor, s: Tensor, grid: Grid, tensor: float) -> Iterator[Tensor]:
    peak = x.abs().amax(0)
    if grid.scale == "nvfp4":
        values = torch.tensor(rounding.e4m3_values(np.arange(127, dtype=np.uint8)).astype(np.float64), device=x.device)
        code = torch.searchsorted(values, s / tensor)
        for offset in BLOCK_CODES:
            yield values[(code + offset).clamp(1, 126)] * tensor
    elif grid.element.kind == "float":
        floor = torch.frexp(peak).exponent.long() - 1 - grid.element.max_exponent
        for offset in (0, 1):
            yield _storable(exact_products.power(floor + offset), s, grid, tensor)
    else:
        least = LEAST.get(grid.element.bits, LEAST_OF_WIDE)
        for step in range(STEPS):
            scale = peak * ((least + step * ((MOST - least) / (STEPS - 1))) / -grid.element.lowest)
            for sign in (1, -1) if grid.scale == "signed" else (1,):
                yield _storable(sign * scale, s, grid, 1.0)


def _storable(wanted: Tensor, s: Tensor, grid: Grid, tensor: float) -> Tensor:
    fits = torch.isfinite(wanted) & ((wanted > 0) | (grid.scale == "signed"))
    wanted = torch.where(fits, wanted, s)
    if grid.scale == "nvfp4":
        return _nearest_float((wanted / tensor).clamp(constants.MIN_BLOCK_SCALE, 448.0), E4M3) * tensor
    if grid.element.kind == "float":
        mantissa, e = torch.frexp(wanted)
        code = torch.where(mantissa < 0.75, e - 1, e).long() + 127
        return exact_products.power(code.clamp(constants.MIN_SCALE_CODE, constants.MAX_SCALE_CODE) - 127)
    near = wanted.clamp(-constants.LIMIT, constants.LIMIT).float().bfloat16().double()
    least = torch.where(near < 0, -constants.MIN_SCALE, constants.MIN_SCALE).double()
    return torch.where(near.abs() < constants.MIN_SCALE, least, near)


def _nearest(y: Tensor, z: Tensor, grid: Grid) -> Tensor:
    element = grid.element
    if element.kind == "float":
        return _nearest_float(y, element)
    if grid.symmetric:
        return y.round().clamp(element.lowest, element.highest)
    return torch.minimum(torch.maximum(y.round(), -z), element.levels - z)


def _nearest_float(y: Tensor, element: Element) -> Tensor:
    floor = (y.abs().view(torch.int64) >> 52) - 1023  # of log2, from the bits
    step = exact_products.power(floor.clamp_min(element.min_exponent) - element.mantissa)
    return ((y / step).round() * step).clamp(-element.largest, element.largest)
