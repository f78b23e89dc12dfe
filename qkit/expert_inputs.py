"""The static scales of the inputs and outputs of experts: gate and up of an expert have one input, down has another."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.errors import StageError
from qkit.reference.ranges import static_contents, static_scales
from qkit.reference.ranges import static_names as static_slots
from qkit.rules import Rule

INPUTS: Final = ("up_input", "down_input")  #: inputs of experts with scales of their own: of gate and up, and of down


def name_of(name: str, projection: str) -> str:
    """The name in `static_names` of the tensor that files call `name` at a projection of one expert."""
    if name.startswith("input"):
        return f"{INPUTS[projection == 'down_proj']}{name.removeprefix('input')}"
    return f"{projection}_{name}"


def slots(rule: Rule, projections: Iterable[str]) -> list[str]:
    """The inputs and outputs of experts with static ranges [experts, 2]; empty where no range is static."""
    static = static_slots(rule)
    inputs = list(INPUTS) if "input" in static else []
    return inputs + [f"{projection}_output" for projection in projections if "output" in static]


def static_names(rule: Rule, projections: Iterable[str]) -> list[str]:
    """The names of the arrays [experts] with the static scales and zero points of experts; empty where no range is static."""
    named = [name_of(name, projection) for name in static_contents(rule) for projection in projections]
    return list(dict.fromkeys(named))


def static_experts(rule: Rule, seen: Mapping[str, NDArray[np.float32]], *, path: str) -> dict[str, NDArray[Any]]:
    """The arrays of `static_names` that follow from the ranges [experts, 2] of `slots`.

    Raises:
        StageError: no token reached an expert; the message names all such experts.
    """
    first = next(iter(seen.values()))
    lost = [str(number) for number, (low, high) in enumerate(first) if not low <= high]
    if lost:
        way_out = "or call qkit.calibrating(model, all_experts=True)" if rule.range == "calibrated" else "or train on"
        some = ", ".join(lost[:8]) + (", ..." if len(lost) > 8 else "")
        raise StageError(
            f"{path}: no token reached {len(lost)} of its {len(first)} experts ({some}): run more data, {way_out}"
        )
    out: dict[str, list[NDArray[Any]]] = {}
    for place, ranges in seen.items():
        slot = place.rpartition("_")[2]
        for one in ranges:
            for name, array in static_scales(rule, dict.fromkeys(static_slots(rule), one), path=path).items():
                if name.startswith(slot):
                    out.setdefault(f"{place}{name.removeprefix(slot)}", []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in out.items()}


def static_of(static: Mapping[str, NDArray[Any]], number: int, projection: str, rule: Rule) -> dict[str, NDArray[Any]]:
    """Of `static_experts` the arrays [1] of one expert's projection, by their names in files."""
    return {name: static[name_of(name, projection)][number : number + 1] for name in static_contents(rule)}
