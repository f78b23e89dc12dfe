"""The law of learned ranges: scales, zero points and exponent offsets that are trained beside the weight, in NumPy.

Integer scales learn as in LSQ (Esser et al., 2020, https://arxiv.org/abs/1902.08153), zero points as in LSQ+ (Bhalgat et al.,
2020, https://arxiv.org/abs/2004.09576); an offset is added to the exponent that the rule of a float grid gives.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.element import MAX_SCALE_CODE, MIN_SCALE, MIN_SCALE_CODE
from qkit.errors import RangeError
from qkit.grid import Grid
from qkit.qtensor import QTensor, dtype_of
from qkit.reference import rounding
from qkit.reference.rounding import Codes
from qkit.reference.scale_rules import Floats, amax, poison, round_to_bfloat16

NAMES = (
    "weight_scale",
    "weight_zero",
    "weight_offset",
)  #: names of the parameters; float32, shaped like the grid's scales
FIRST = "first_"  #: begins the names of the parameters that found the codes, where scales train alone
FIRSTS = tuple(FIRST + name for name in NAMES)
OFFSETS = NAMES[1:]  #: the parameters that are rounded to whole numbers
FARTHEST = 255.0  #: an offset larger than this changes no code any more


def is_learned(name: str) -> bool:
    """Whether the parameter called `name`, with or without its layer's path, is a learned range. Ranges take no weight decay."""
    return name.rpartition(".")[2].endswith(NAMES)  # of experts with the projection before it, `gate_proj_weight_scale`


def is_offset(name: str) -> bool:
    """Whether the parameter called `name` counts whole codes or powers of two: a zero point, or an offset of exponents.

    An offset changes no value before it has moved by a half. At the weights' learning rate that would take for ever.
    """
    return name.rpartition(".")[2].endswith(OFFSETS)


def names(grid: Grid) -> tuple[str, ...]:
    """The parameters that a layer learns beside a weight on `grid`."""
    if grid.element.kind == "float":
        return ("weight_offset",)
    return ("weight_scale",) if grid.symmetric else ("weight_scale", "weight_zero")


def stored_names(grid: Grid, scales: str) -> tuple[str, ...]:
    """The parameters of a layer whose rule has these `scales`; where they train `alone`, those that found its codes, too."""
    mine = names(grid)
    return mine + tuple(FIRST + name for name in mine) if scales == "alone" else mine


def factor(grid: Grid, shape: tuple[int, ...]) -> float:
    """The factor of the gradients of ranges: 1/sqrt(elements of a group * largest code), LSQ's equation 4."""
    largest = grid.element.largest if grid.symmetric else grid.element.levels
    return 1.0 / math.sqrt(grid.group_shape(shape)[-1] * largest)


def initial(w: NDArray[Any], grid: Grid) -> dict[str, Floats]:
    """The first parameters of `w` [..., n]: the scales and zero points of the grid's rule, or offsets of zero."""
    x = rounding.group(w, grid)
    if grid.element.kind == "float":
        return {"weight_offset": np.zeros(x.shape[:-1], np.float32)}
    if grid.symmetric:
        return {"weight_scale": rounding.symmetric_scale(x, grid)}
    scale, zero = rounding.asymmetric_scale(x, grid.element)
    return {"weight_scale": scale, "weight_zero": zero}


def parameters_of(q: QTensor[NDArray[Any]]) -> dict[str, Floats]:
    """The parameters that give the values of `q` the codes and scales of `q`: the inverse of `quantize`. Not for `nvfp4`."""
    if q.grid.element.kind == "float":
        by_rule = rounding.scale_code(amax(rounding.group(rounding.dequantize(q), q.grid)), q.grid)
        return {"weight_offset": q.scales.astype(np.float32) - by_rule.astype(np.float32)}
    zeros = {} if q.zeros is None else {"weight_zero": q.zeros.astype(np.float32)}
    return {"weight_scale": q.scales, **zeros}


def steps(w: NDArray[Any], grid: Grid, parameters: Mapping[str, Floats]) -> tuple[Floats, Floats | None]:
    """The fp32 step of each group of `w`, and its zero point under `minmax`: the parameters after rounding and limits.

    Scales are on the bfloat16 grid, at least 2^-96 in magnitude, and negative under `signed` only. NaN where a parameter is not
    finite.
    """
    if grid.element.kind == "float":
        return _offset_steps(rounding.group(w, grid), grid, parameters["weight_offset"]), None
    p = parameters["weight_scale"]
    with np.errstate(invalid="ignore"):
        return _integer_steps(p, parameters.get("weight_zero"), grid)


def quantize(w: NDArray[Any], grid: Grid, parameters: Mapping[str, Floats]) -> QTensor[NDArray[Any]]:
    """Codes of finite `w` on the scales that finite `parameters` give."""
    x = rounding.group(w, grid)
    s, z = steps(w, grid, parameters)
    if z is not None:
        q = rounding.asymmetric_codes(x, s, z, grid.element).astype(np.uint8)
        return QTensor(q.reshape(w.shape), s, grid, dtype_of(w), zeros=z.astype(np.uint8))
    if grid.element.kind == "integer":
        q = rounding.symmetric_codes(x, s, grid.element).astype(np.int8)
        return QTensor(q.reshape(w.shape), s, grid, dtype_of(w))
    c: Codes = rounding.exponent(s)
    with np.errstate(over="ignore"):  # boundaries, where an offset is large: no number lies beyond them
        return QTensor(rounding.float_codes(x, c, grid.element).reshape(w.shape), c, grid, dtype_of(w))


def fake_quantize(w: NDArray[Any], grid: Grid, parameters: Mapping[str, Floats]) -> NDArray[Any]:
    """`reference.dequantize(quantize(w, grid, parameters))`, bit for bit; NaN where a value or a parameter is not finite."""
    s, z = steps(w, grid, parameters)
    with np.errstate(over="ignore", invalid="ignore"):
        return rounding.fake_quantize(w, grid, scales=s, zeros=z)  # type: ignore[arg-type]  # zero points as floats


def alone(w: NDArray[Any], grid: Grid, parameters: Mapping[str, Floats]) -> QTensor[NDArray[Any]]:
    """The codes of finite `w` by the `FIRST` ones of `parameters`, on the scales of the others: scales train, codes stay."""
    first = {name.removeprefix(FIRST): one for name, one in parameters.items() if name.startswith(FIRST)}
    return replace(quantize(w, grid, first), scales=steps(w, grid, parameters)[0])


def gradient_alone(
    w: NDArray[Any], grid: Grid, parameters: Mapping[str, Floats], gradient: NDArray[Any]
) -> dict[str, Floats]:
    """The gradient of scales that train alone, where the values of `alone` have `gradient` [..., n]: dv/ds = v/s, by `factor`.

    It passes straight through the roundings and limits of `steps`. Weights and zero points have none.
    """
    q = alone(w, grid, parameters)
    units = rounding.group(q.codes.astype(np.float32), grid)
    units = units if q.zeros is None else units - q.zeros.astype(np.float32)[..., None]
    moved = (rounding.group(gradient, grid) * units).sum(axis=-1)
    return {"weight_scale": moved * np.float32(factor(grid, w.shape))}


def gradients(
    w: NDArray[Any], grid: Grid, parameters: Mapping[str, Floats], gradient: NDArray[Any]
) -> dict[str, Floats]:
    """The gradients of `weight` and of each of `parameters`, in fp32, where the values have `gradient` [..., n].

    With v the value of w, and w clipped where it does not round to a code: dv/dw is 1, and 0 where clipped. dv/ds is (v - w)/s,
    and v/s where clipped. dv/dz is 0, and -s where clipped. dv/d(offset) is dv/ds * s * ln 2. The last three are multiplied with
    `factor`, and pass straight through the roundings and limits of `steps`.
    """
    x, g = rounding.group(w, grid), rounding.group(gradient, grid)
    s, z = steps(w, grid, parameters)
    wide = w.astype(np.float32)
    inside = rounding.unclipped(wide, grid, scales=s, zeros=z).reshape(x.shape)  # type: ignore[arg-type]
    v = rounding.group(fake_quantize(wide, grid, parameters), grid)
    made = {"weight": np.where(inside, g, np.float32(0)).reshape(w.shape)}
    moved = (g * (v - np.where(inside, x, np.float32(0)))).sum(axis=-1) * np.float32(factor(grid, w.shape))
    if grid.element.kind == "float":
        return {**made, "weight_offset": moved * np.float32(math.log(2))}
    made["weight_scale"] = moved / s
    if z is not None:
        clipped = np.where(inside, np.float32(0), g).sum(axis=-1)
        made["weight_zero"] = clipped * -s * np.float32(factor(grid, w.shape))
    return made


def learned_codes(w: NDArray[Any], grid: Grid, parameters: Mapping[str, Floats], *, path: str) -> QTensor[NDArray[Any]]:
    """`quantize`, or `alone`, for the finite weight of the prepared layer at `path`.

    Raises:
        RangeError: a parameter is not finite.
    """
    for name, values in parameters.items():
        if not np.isfinite(values).all():
            full = f"{path}.{name}" if path else name
            raise RangeError(f"{full} is not finite: go back to an earlier checkpoint, and lower the learning rate")
    return (
        alone(w, grid, parameters)
        if any(name.startswith(FIRST) for name in parameters)
        else quantize(w, grid, parameters)
    )


def _integer_steps(p: Floats, zero: Floats | None, grid: Grid) -> tuple[Floats, Floats | None]:
    s = round_to_bfloat16(p)
    if grid.scale == "signed":
        least = np.where(p < 0, np.float32(-MIN_SCALE), np.float32(MIN_SCALE))
        s = np.where(np.abs(s) < np.float32(MIN_SCALE), least, s)
    else:
        s = np.maximum(s, np.float32(MIN_SCALE))
    s = s + poison(p)
    if zero is None:
        return s, None
    return s, np.clip(np.rint(zero), 0, grid.element.levels).astype(np.float32) + poison(zero)


def _offset_steps(x: Floats, grid: Grid, offset: Floats) -> Floats:
    peak = amax(x)
    with np.errstate(invalid="ignore"):
        whole = np.clip(np.rint(offset), -FARTHEST, FARTHEST).astype(np.int32)
        c = np.clip(rounding.scale_code(peak, grid).astype(np.int32) + whole, MIN_SCALE_CODE, MAX_SCALE_CODE)
        return rounding.power(c) + poison(peak) + poison(offset)
