"""quantize, fit, dequantize, fake_quantize: one array of any framework, whose type chooses the engine unless `backend` does."""

from __future__ import annotations  # the protocols are for the type checker: `import qkit` stays cheap

import os
from typing import TYPE_CHECKING, Any

from qkit.element import LIMIT
from qkit.engines.registry import backend as choose
from qkit.engines.registry import backend_of
from qkit.engines.registry import recipe as find_recipe
from qkit.errors import BackendError, GridError, RangeError, RecipeError
from qkit.grid import Grid, want_grid
from qkit.qtensor import QTensor, dtype_of, shape_of
from qkit.rules import Recipe, Ste

if TYPE_CHECKING:
    from pathlib import Path

    from qkit.engines.protocol import Arrays
    from qkit.reference.fitting import Method


def quantize(w: Any, grid: Grid | str | Path | Recipe, *, backend: str | Arrays | None = None) -> QTensor[Any]:
    """Codes and scales of `w`: Float [..., n] -> codes [..., n], scales [..., groups].

    Args:
        w: a NumPy, torch or MLX array of float32, bfloat16 or float16; groups lie along its last axis.
        grid: the numbers to round to. Or a recipe with one weight grid, by its name, its file or itself.
        backend: an engine by name, or itself; left out, the one of `w`.

    Raises:
        DTypeError: `w` is not of these three types.
        GridError: `w` is empty, its last axis does not divide into groups, or `grid` stands for no grid.
        RangeError: a NaN, an infinity, or a magnitude of 2^127 and more.
    """
    grid = _grid(grid)
    engine = _engine(w, backend)
    check(engine, w, grid, name="the array")
    return engine.quantize(w, grid)


def fit(
    w: Any,
    grid: Grid | str | Path | Recipe,
    moments: Any = None,
    *,
    method: Method = "search",
    backend: str | Arrays | None = None,
) -> QTensor[Any]:
    """Codes and scales of `w` that lose less than those of `quantize`, in the same bytes, for the same readers.

    Computed in fp64 by the law on the host, or with its bits on a GPU: equal arguments give equal codes everywhere.

    Args:
        w: as for `quantize`.
        grid: as for `quantize`.
        backend: as for `quantize`.
        moments: E[x x'] `[n, n]` of the inputs that the weight multiplies, an array of any framework; `search` takes its diagonal
            `[n]`, too, or None.
        method: `search` tries scales. `solve` also chooses codes whose errors make up for one another; it needs `moments`.

    Raises:
        DTypeError, GridError, RangeError: as for `quantize`. GridError also for scales that follow from no rule and for moments
            that are missing or do not fit, and RangeError for moments that no inputs have.
    """
    from qkit.fitting.inputs import Inputs  # here, as the next
    from qkit.reference.fitting import fit as law  # here, so that `import qkit` stays cheap

    grid = _grid(grid)
    engine = _engine(w, backend)
    check(engine, w, grid, name="the array")
    known = None if moments is None else backend_of(moments).to_numpy(moments)
    place = getattr(w, "device", None)
    home = (
        engine.on(str(place)) if hasattr(place, "type") else engine
    )  # a torch.device; other frameworks have none to choose
    if method == "solve" and known is not None and known.ndim == 2:
        return Inputs(known, home).solve(engine.to_numpy(w), grid).map(home.from_numpy)
    return law(engine.to_numpy(w), grid, known, method=method).map(home.from_numpy)


def dequantize(q: QTensor[Any], *, backend: str | Arrays | None = None) -> Any:
    """The values of `q` [..., n], computed in fp32 and rounded once to `q.dtype`."""
    return _engine(q.codes, backend).dequantize(q)


def fake_quantize(
    w: Any, grid: Grid | str | Path | Recipe, *, ste: Ste = "identity", backend: str | Arrays | None = None
) -> Any:
    """`dequantize(quantize(w, grid))`, bit for bit; the gradient with respect to `w` passes straight through.

    NaN and infinity are no errors: a group with one comes back as NaN. For torch.compile, call this function once outside
    compiled code first, or use `qkit.backend("torchao").fake_quantize`.

    Args:
        grid: as for `quantize`.
        ste: the straight-through estimator: `identity` passes the gradient as it is, `masked` only where no value was clipped.

    Raises:
        DTypeError, GridError: as for `quantize`.
    """
    grid = _grid(grid)
    dtype_of(w)
    grid.scale_shape(shape_of(w))
    return _engine(w, backend).fake_quantize(w, grid, ste=ste)


def check(engine: Arrays, w: Any, grid: Grid, *, name: str) -> None:
    """Refuses an array without codes on `grid`; messages call it `name`. Raises as `quantize` does."""
    try:
        dtype_of(w)
        grid.scale_shape(shape_of(w))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    magnitude = engine.magnitude(w)
    if not magnitude < LIMIT:
        what = "holds NaN" if magnitude != magnitude else f"holds a magnitude of {magnitude:g}"
        raise RangeError(
            f"{name} {what}: only finite values below 2^127 have codes; find what made it before you quantize"
        )


def _grid(choice: Grid | str | Path | Recipe) -> Grid:
    """`choice`, or the only weight grid of the recipe that it names."""
    if isinstance(choice, Grid):
        return choice
    if not isinstance(choice, (str, os.PathLike, Recipe)):
        want_grid(choice)
    try:
        found = find_recipe(choice)
    except RecipeError as error:
        raise GridError(
            f"{choice!r} is neither a grid, such as qkit.Grid('int4', 64) or qkit.Grid.parse('int4-g64-signed'), nor a recipe: "
            f"{error}"
        ) from None
    grids = dict.fromkeys(rule.weight for rule in found.rules if rule.weight)
    if len(grids) != 1:
        raise GridError(
            f"recipe {found.name!r} has {len(grids)} weight grids, {', '.join(map(str, grids))}: choose one, such as "
            f"qkit.Grid.parse({str(next(iter(grids)))!r})"
        )
    return next(iter(grids))


def _engine(array: Any, backend: str | Arrays | None) -> Arrays:
    own = backend_of(array)
    if backend is None:
        return own
    engine = choose(backend)
    if engine.framework != own.framework:
        way_out = f"carry it over with qkit.backend({engine.name!r}).from_numpy"
        raise BackendError(
            f"backend {engine.name!r} works on {engine.framework}, not on an array of {own.framework}: {way_out}"
        )
    return engine
