"""When training quantizes, as a pure function of the step; and the hook that the loop calls with it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from qkit.backend import Backend
from qkit.errors import RunError
from qkit.layer import Mode

LATER = ("interval", "ramp")  #: words of issue files that this version cannot honour, and does not ignore


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps count from 1. Before a step, each prepared layer that `match` names is switched as `mode` says; others are on.

    Attributes:
        start: the first step that quantizes; before it, the float model is trained.
        windows: first and last steps between which it quantizes, of one or more stretches; empty: always, from `start` on.
        match: shell pattern for the paths of the layers that are switched.
    """

    start: int = 1
    windows: tuple[tuple[int, int], ...] = ()
    match: str = "*"

    def __post_init__(self) -> None:
        if type(self.start) is not int or self.start < 1:
            raise RunError(f"quantization.start is {self.start!r}: steps count from 1")
        for window in self.windows:
            if len(window) != 2 or not all(type(step) is int for step in window) or not 1 <= window[0] <= window[1]:
                raise RunError(f"quantization.windows has {list(window)}: want [first, last], steps that count from 1")
        if not isinstance(self.match, str) or not self.match:
            raise RunError(f"quantization.match is {self.match!r}: want a pattern, such as '*'")

    def mode(self, step: int) -> Mode:
        """`on` or `off`."""
        inside = not self.windows or any(first <= step <= last for first, last in self.windows)
        return "on" if step >= self.start and inside else "off"


def schedule_from_table(table: Mapping[str, Any]) -> Schedule:
    """The schedule that a parsed TOML table describes.

    Raises:
        RunError: a key is unknown or of the wrong type.
    """
    for key in table:
        if key in LATER:
            raise RunError(f"quantization.{key} is not there yet: leave it out, and use start and windows")
        if key not in Schedule.__dataclass_fields__:
            raise RunError(f"unknown key quantization.{key}: there is {', '.join(Schedule.__dataclass_fields__)}")
    windows = table.get("windows", [])
    if not isinstance(windows, list) or not all(isinstance(window, list) for window in windows):
        raise RunError(f"quantization.windows is {windows!r}: want a list of [first, last]")
    return Schedule(table.get("start", 1), tuple(map(tuple, windows)), table.get("match", "*"))


def schedule_table(schedule: Schedule) -> dict[str, Any]:
    """The inverse of `schedule_from_table`, complete."""
    return {"start": schedule.start, "windows": [list(w) for w in schedule.windows], "match": schedule.match}


def switching(engine: Backend, model: Any, schedule: Schedule) -> Callable[[int], None]:
    """A function to call before each step; after it the layers of `model` are as `schedule` says.

    Raises:
        RunError: the schedule is not the plain one, and no prepared layer matches.
    """
    layers = [layer for layer in engine.layers(model) if layer.stage == "prepared"]
    layers = [layer for layer in layers if fnmatchcase(layer.path, schedule.match)]
    if not layers and schedule != Schedule():
        raise RunError(f"quantization: no prepared layer matches {schedule.match!r}")
    known: dict[str, Mode] = {layer.path: layer.mode for layer in layers}

    def before(step: int) -> None:
        mode = schedule.mode(step)
        for layer in layers:
            if known[layer.path] != mode:
                engine.switch(layer.module, mode)
                known[layer.path] = mode

    return before
