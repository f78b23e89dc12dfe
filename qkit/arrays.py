"""Quantizing one array of any framework: the engine follows from the array, unless it is named."""

from typing import Any

from qkit.element import LIMIT
from qkit.engines.protocol import Arrays
from qkit.engines.registry import backend as choose
from qkit.engines.registry import backend_of
from qkit.errors import BackendError, RangeError
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of, shape_of
from qkit.rules import Ste


def quantize(w: Any, grid: Grid, *, backend: str | Arrays | None = None) -> QTensor[Any]:
    """Codes and scales of `w`: Float [..., n] -> codes [..., n], scales [..., groups].

    Args:
        w: a NumPy, torch or MLX array of float32, bfloat16 or float16; groups lie along its last axis.
        grid: the numbers to round to.
        backend: an engine by name, or itself; left out, the one of `w`.

    Raises:
        DTypeError: `w` is not of these three types.
        GridError: `w` is empty, or its last axis does not divide into groups.
        RangeError: a NaN, an infinity, or a magnitude of 2^127 and more.
    """
    engine = _engine(w, backend)
    check(engine, w, grid, name="the array")
    return engine.quantize(w, grid)


def dequantize(q: QTensor[Any], *, backend: str | Arrays | None = None) -> Any:
    """The values of `q` [..., n], computed in fp32 and rounded once to `q.dtype`."""
    return _engine(q.codes, backend).dequantize(q)


def fake_quantize(w: Any, grid: Grid, *, ste: Ste = "identity", backend: str | Arrays | None = None) -> Any:
    """`dequantize(quantize(w, grid))`, bit for bit; the gradient with respect to `w` passes straight through.

    Does not look for NaN or infinity: a group that holds one comes back as NaN. Under torch.compile the engine must have been
    met before: call it once outside, or use `qkit.backend("torchao").fake_quantize`.

    Args:
        ste: the straight-through estimator: `identity` passes the gradient as it is, `masked` only where no value was clipped.

    Raises:
        DTypeError, GridError: as for `quantize`.
    """
    dtype_of(w)
    grid.scale_shape(shape_of(w))
    return _engine(w, backend).fake_quantize(w, grid, ste=ste)


def check(engine: Arrays, w: Any, grid: Grid, *, name: str) -> None:
    """Refuses what has no codes on `grid`; `name` is what messages call `w`. Raises as `quantize` does."""
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
