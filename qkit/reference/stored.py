"""The law of read grids: new codes on scales that a `QTensor` has already. Adapters on such a base merge into its codes.

A value is rounded to the nearest code of its group; scales, zero points and biases stay. A scale of 0 stands for an infinite one,
whose only code is that of 0 (or of the bias).
"""

from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qkit.qtensor import QTensor, dtype_of
from qkit.reference import rounding
from qkit.reference.rounding import FLOAT8, each
from qkit.reference.scale_rules import Floats


def requantize(w: NDArray[Any], like: QTensor[NDArray[Any]]) -> QTensor[NDArray[Any]]:
    """The codes of finite `w` [..., n], whose shape is that of `like`, on the scales of `like`, in the type of `w`."""
    with np.errstate(over="ignore"):
        codes = _codes(_grouped(w, like), like)
    return replace(like, codes=codes.astype(like.codes.dtype).reshape(w.shape), dtype=dtype_of(w))


def fake_requantize(w: NDArray[Any], like: QTensor[NDArray[Any]]) -> NDArray[Any]:
    """`dequantize(requantize(w, like))`, bit for bit. A NaN or an infinity makes itself NaN."""
    finite = np.isfinite(w)
    values = rounding.dequantize(requantize(np.where(finite, w, w.dtype.type(0)), like))
    return np.where(finite, values, values.dtype.type(np.nan))


def unclipped(w: NDArray[Any], like: QTensor[NDArray[Any]]) -> NDArray[np.bool_]:
    """Where `w` [..., n] rounds to a code on the scales of `like` without being clipped."""
    x, element = _grouped(w, like), like.grid.element
    with np.errstate(over="ignore", invalid="ignore"):
        if element.kind == "float":
            inside = np.abs(x) <= each(np.float32(element.largest) * np.abs(_steps(like)))
        else:
            q, lowest = _quotient(x, like), element.lowest if like.grid.symmetric else 0
            inside = (q >= lowest) & (q <= lowest + element.levels)
    return cast(NDArray[np.bool_], inside.reshape(w.shape))


def _grouped(w: NDArray[Any], like: QTensor[NDArray[Any]]) -> Floats:
    return w.astype(np.float32).reshape(like.grid.group_shape(w.shape))


def _codes(x: Floats, like: QTensor[NDArray[Any]]) -> NDArray[Any]:
    element, s = like.grid.element, _steps(like)
    if element.name == "e2m1":
        return rounding.e2m1_codes(x * each(np.sign(s)), np.abs(s))
    if element.kind == "float":
        y = np.clip(x / each(s), -element.largest, element.largest).astype(np.float32)
        return cast(NDArray[Any], y.astype(FLOAT8[element.name]).view(np.uint8))
    lowest = element.lowest if like.grid.symmetric else 0
    return np.clip(_quotient(x, like), lowest, lowest + element.levels)


def _quotient(x: Floats, like: QTensor[NDArray[Any]]) -> Floats:
    """The code of each value as a float, before it is clipped: fl(fl(x - bias) / s) to nearest even, plus the zero point."""
    if like.biases is not None:
        x = x - each(like.biases.astype(np.float32))
    q = np.rint(x / each(_steps(like)))
    return cast(Floats, q if like.zeros is None else q + each(like.zeros.astype(np.float32)))


def _steps(like: QTensor[NDArray[Any]]) -> Floats:
    s = rounding.scale_values(like)
    return np.where(s == 0, np.float32(np.inf), s)
