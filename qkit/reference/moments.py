"""The second moments of a layer's inputs, as `solve` uses them."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qkit.errors import GridError, RangeError
from qkit.reference.products import BITS, Doubles, product, total, unit_upper

DAMPING = 0.01  #: of the mean square of all inputs, added to that of each
SYMMETRY = 1e-3  #: difference of h_ij and h_ji that rounding explains, in units of their inputs' root mean squares


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments H = E[x x'] of inputs, with what `solve` derives from them. Layers with the same inputs share one.

    Attributes:
        source: E[x x'] itself [n, n], as it was given.
        diagonal: mean squares [n].
        damping: the number that is added to each of them.
        sizes: powers of two near the root of each mean square and the damping [n].
        correlations: H over the sizes of both inputs [n, n], to 2^-20.
        order: inputs by falling mean square. `solve` rounds in this order: later inputs make up for earlier ones.
        upper: `products.unit_upper` of H + damping, inputs in this order.
    """

    source: NDArray[Any]
    diagonal: Doubles
    damping: float
    sizes: Doubles
    correlations: Doubles
    order: NDArray[np.int64]
    upper: Doubles

    @classmethod
    def of(cls, moments: NDArray[Any] | None) -> "Moments":
        """Those of `moments` [n, n].

        Raises:
            GridError, RangeError: as `fit`.
        """
        if moments is None or moments.ndim != 2:
            what = "none" if moments is None else f"an array of shape {moments.shape}"
            raise GridError(
                f"solve needs the moments E[x x'] [inputs, inputs] of the layer's inputs, not {what}: calibrate first, or search"
            )
        diagonal = mean_squares(moments, len(moments))
        h = (moments.astype(np.float64) + moments.T.astype(np.float64)) / 2
        damping = DAMPING * float(total(diagonal)) / len(h)
        order = np.argsort(-diagonal, kind="stable")
        damped = h[np.ix_(order, order)]
        damped[np.diag_indices(len(h))] += damping
        try:
            upper = unit_upper(damped)
        except ArithmeticError:
            raise RangeError(
                "the moments are not E[x x'] of any inputs, since they have a negative direction: sum them in fp32 or fp64"
            ) from None
        sizes = powers_near_roots(diagonal + damping)
        return cls(moments, diagonal, damping, sizes, correlations(h, sizes), order, upper)

    def times(self, d: Doubles, rows: slice = slice(None), inputs: slice = slice(None)) -> Doubles:
        """H[rows, inputs] @ d to 2^-20, with the same bits everywhere."""
        found = product(self.correlations[rows, inputs], self.sizes[inputs, None] * d)
        return self.sizes[rows, None] * found


def powers_near_roots(squares: Doubles) -> Doubles:
    """The powers of two within a factor of two of the roots of positive numbers."""
    return cast(Doubles, np.ldexp(1.0, np.frexp(squares)[1] // 2))


def correlations(h: Doubles, sizes: Doubles) -> Doubles:
    """H over the sizes of both inputs: at most 2, since no mean product exceeds the root of that of two mean squares."""
    unit = 2.0 ** (1 - BITS)
    return np.clip(np.rint(h / sizes[:, None] / sizes / unit), -(2**BITS), 2**BITS) * unit


def mean_squares(moments: NDArray[Any] | Moments | None, n: int) -> Doubles:
    """The weights [n] of the errors of `n` inputs: the diagonal of their moments, or ones where nothing is known.

    Raises:
        GridError, RangeError: as `fit`.
    """
    if moments is None:
        return np.ones(n)
    if isinstance(moments, Moments):
        found = moments.diagonal
    else:
        if moments.shape not in ((n,), (n, n)):
            raise GridError(
                f"moments of shape {moments.shape} do not fit a weight of {n} inputs: want [{n}] or [{n}, {n}]"
            )
        found = (moments if moments.ndim == 1 else moments.diagonal()).astype(np.float64)
        _check(moments, found)
    if len(found) != n:
        raise GridError(f"moments of {len(found)} inputs do not fit a weight of {n} inputs")
    return found


def want_moments(finite: bool, diagonal: Doubles, symmetric: bool) -> None:
    """Refuses moments that cannot be E[x x'] of inputs.

    Args:
        finite: whether all are finite.
        diagonal: mean squares [n].
        symmetric: whether h_ij and h_ji differ by no more than `SYMMETRY`.

    Raises:
        RangeError: the message says why.
    """
    if not finite:
        raise RangeError("moments hold NaN or infinity: an input of the layer was not finite; find its origin")
    if diagonal.min() < 0:
        raise RangeError(f"moments hold a mean square of {diagonal.min():g}: a square is not negative")
    if not diagonal.any():
        raise RangeError(
            "moments are zero everywhere: no token has reached the layer; search without moments, or give more data"
        )
    if not symmetric:
        raise RangeError("moments are not symmetric, as E[x x'] is: sum x x' over the inputs of the layer")


def _check(moments: NDArray[Any], diagonal: Doubles) -> None:
    finite, symmetric = bool(np.isfinite(moments).all()), True
    if finite and moments.ndim == 2:
        root = np.sqrt(np.maximum(diagonal, 0))
        apart = np.abs(moments - moments.T).astype(np.float64)
        symmetric = not (apart > SYMMETRY * root[:, None] * root).any()
    want_moments(finite, diagonal, symmetric)
