"""Static activations: scales that follow from the lowest and the highest value that a layer has seen."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.errors import ArtifactError, StageError
from qkit.grid import Grid
from qkit.reference import packing, rounding
from qkit.rules import Rule

PREFIX = {"activation": "input", "output": "output"}  #: the first word of the names of a slot's tensors


def static_names(rule: Rule) -> dict[str, Grid]:
    """`input` and `output`, if `rule` makes them static, with their grids."""
    return {} if rule.range == "dynamic" else {PREFIX[slot]: grid for slot, grid in rule.slots.items()}


def static_scales(rule: Rule, ranges: Mapping[str, NDArray[np.float32]], *, path: str) -> dict[str, NDArray[Any]]:
    """The static scales and zero points of a converted layer, by compressed-tensors' names.

    Args:
        ranges: for `input` and `output`, the lowest and the highest value seen [2].
        path: of the layer, for messages.

    Returns:
        `input_scale` and `output_scale`: float32 [1], the step; under `minmax` also `input_zero_point` and
        `output_zero_point`: int8 [1], the zero point less 2^(bits-1).

    Raises:
        StageError: a range is empty: the layer has seen no value.
    """
    stored: dict[str, NDArray[Any]] = {}
    for name, grid in static_names(rule).items():
        low, high = (float(bound) for bound in ranges[name])
        if not low <= high:
            way_out = "run data through it under qkit.calibrating(model)" if rule.range == "calibrated" else "train it"
            raise StageError(f"{path}: the range of its {name} is not known yet: {way_out} before you convert")
        q = rounding.quantize(np.asarray(ranges[name], np.float32), grid)
        stored[f"{name}_scale"] = rounding.scale_values(q)
        if q.zeros is not None:
            stored[f"{name}_zero_point"] = packing.signed(q.zeros, grid.element)
    return stored


def check_static(stored: Mapping[str, NDArray[Any] | None], rule: Rule) -> dict[str, NDArray[Any]]:
    """`stored`, if `static_scales` could have returned it for `rule`.

    Raises:
        ArtifactError: a tensor is missing, has another type or shape, or holds a number that is no scale.
    """
    checked = {}
    for name, kind in static_contents(rule).items():
        array = stored[name]
        if array is None:
            raise ArtifactError(f"{name} is missing, which a range that is {rule.range} needs")
        if (array.dtype.name, array.shape) != (kind, (1,)):
            raise ArtifactError(f"{name} is {array.dtype.name} {list(array.shape)}, and should be {kind} [1]")
        grid = static_names(rule)[name.partition("_")[0]]
        spare = 0xFFFF if grid.element.kind == "integer" else 0x7FFFFF  # bits of a bfloat16, of a power of two
        if kind == "float32" and (not np.isfinite(array[0]) or array[0] == 0 or array.view(np.uint32)[0] & spare):
            raise ArtifactError(f"{name} is {array[0]}, which is no scale of {grid}")
        checked[name] = array
    return checked


def static_contents(rule: Rule) -> dict[str, str]:
    """Name and NumPy type of each tensor that `static_scales` returns for `rule`. Every shape is [1]."""
    stored = {}
    for name, grid in static_names(rule).items():
        stored[f"{name}_scale"] = "float32"
        if not grid.symmetric:
            stored[f"{name}_zero_point"] = "int8"
    return stored
