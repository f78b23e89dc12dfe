"""The static scales of the inputs of experts: gate and up of an expert have one input, and down has another."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.errors import StageError
from qkit.reference.ranges import static_contents, static_scales
from qkit.rules import Rule

INPUTS: Final = ("up_input", "down_input")  #: inputs of experts with scales of their own: of gate and up, and of down


def name_of(name: str, projection: str) -> str:
    """The name in `static_names` of what files call `name` at a projection of one expert."""
    return f"{INPUTS[projection == 'down_proj']}{name.removeprefix('input')}"


def static_names(rule: Rule) -> list[str]:
    """The names of the arrays [experts] with the static scales and zero points of experts; empty where no range is static."""
    return [f"{place}{name.removeprefix('input')}" for name in static_contents(rule) for place in INPUTS]


def static_experts(rule: Rule, seen: Mapping[str, NDArray[np.float32]], *, path: str) -> dict[str, NDArray[Any]]:
    """The arrays of `static_names` that follow from the ranges [experts, 2] of `INPUTS`.

    Raises:
        StageError: no token reached an expert; the message names all such experts.
    """
    lost = [str(number) for number, (low, high) in enumerate(seen["up_input"]) if not low <= high]
    if lost:
        way_out = "or call qkit.calibrating(model, all_experts=True)" if rule.range == "calibrated" else "or train on"
        some = ", ".join(lost[:8]) + (", ..." if len(lost) > 8 else "")
        raise StageError(
            f"{path}: no token reached {len(lost)} of its {len(seen['up_input'])} experts ({some}): run more data, {way_out}"
        )
    out: dict[str, list[NDArray[Any]]] = {}
    for place in INPUTS:
        for one in seen[place]:
            for name, array in static_scales(rule, {"input": one}, path=path).items():
                out.setdefault(f"{place}{name.removeprefix('input')}", []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in out.items()}


def static_of(static: Mapping[str, NDArray[Any]], number: int, projection: str) -> dict[str, NDArray[Any]]:
    """Of `static_experts` the arrays [1] of one expert's projection, by their names in files."""
    place = INPUTS[projection == "down_proj"]
    found = {name: array for name, array in static.items() if name.startswith(place)}
    return {f"input{name.removeprefix(place)}": array[number : number + 1] for name, array in found.items()}
