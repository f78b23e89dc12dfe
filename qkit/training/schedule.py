"""The schedule of quantization, as a pure function of the step; and the hook that the loop calls before each step."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from qkit.engines.layer import Layer, Mode
from qkit.engines.protocol import Trains
from qkit.errors import RecipeError, RunError
from qkit.restaging import rules_on
from qkit.rules import Rule


@dataclass(frozen=True, slots=True)
class Schedule:
    """When layers quantize. Before each step, the loop switches each prepared layer that `match` names to `mode(step)`.

    Steps count from 1. Layers that `match` does not name always quantize.

    Attributes:
        start: the first step that quantizes. Before it, the float model trains.
        windows: pairs of a first and a last step; layers quantize within them only. Empty: always, from `start` on.
        match: shell pattern for the paths of the layers that the schedule switches.
        interval: how many steps in a row train with the same quantized values, while the weights change. Steps 1,
            1 + interval and so on refresh the values. Evaluation always takes current values. Windows begin at a
            refresh, and checkpoints are written before one, so that a run that resumes refreshes at the same steps.
        ramp: pairs of a last step and a recipe that come before the run's own recipe, in order, such as
            ((500, "int8-g64"), (800, "int6-g64")). They quantize the same layers, on the same ranges. Master weights and the
            state of the optimizer stay. Evaluations are on the run's own recipe.
    """

    start: int = 1
    windows: tuple[tuple[int, int], ...] = ()
    match: str = "*"
    interval: int = 1
    ramp: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        if type(self.start) is not int or self.start < 1:
            raise RunError(f"quantization.start is {self.start!r}: steps count from 1")
        for window in self.windows:
            if len(window) != 2 or not all(type(step) is int for step in window) or not 1 <= window[0] <= window[1]:
                raise RunError(f"quantization.windows has {list(window)}: want [first, last], steps that count from 1")
        if not isinstance(self.match, str) or not self.match:
            raise RunError(f"quantization.match is {self.match!r}: want a pattern, such as '*'")
        if type(self.interval) is not int or self.interval < 1:
            raise RunError(f"quantization.interval is {self.interval!r}: want a whole number from 1 on")
        for step in (self.start, *(first for first, _ in self.windows)):
            if (step - 1) % self.interval:
                near = step - (step - 1) % self.interval
                raise RunError(
                    f"quantization: step {step} begins to quantize between two refreshes, which are {self.interval} apart: "
                    f"begin at {near}, or at {near + self.interval}"
                )
        self._check_ramp()

    def _check_ramp(self) -> None:
        before = 0
        for stage in self.ramp:
            if len(stage) != 2 or type(stage[0]) is not int or not isinstance(stage[1], str) or stage[0] <= before:
                raise RunError(
                    f"quantization.ramp has {list(stage)}: want [last step, recipe], with last steps that rise"
                )
            before = stage[0]

    def mode(self, step: int) -> Mode:
        """The mode of the layers at `step`: `on` or `off`."""
        inside = not self.windows or any(first <= step <= last for first, last in self.windows)
        return "on" if step >= self.start and inside else "off"

    def recipe(self, step: int) -> str | None:
        """The recipe of the ramp at `step`. None: the run's own."""
        return next((recipe for last, recipe in self.ramp if step <= last), None)

    @property
    def first_own(self) -> int:
        """The first step that trains on the run's own recipe."""
        begin = max(self.start, self.ramp[-1][0] + 1 if self.ramp else 1)
        return max(begin, min((first for first, last in self.windows if last >= begin), default=begin))


def schedule_from_table(table: Mapping[str, Any]) -> Schedule:
    """The schedule that a parsed TOML table describes.

    Raises:
        RunError: a key is unknown or of the wrong type.
    """
    for key in table:
        if key not in Schedule.__dataclass_fields__:
            raise RunError(f"unknown key quantization.{key}: there is {', '.join(Schedule.__dataclass_fields__)}")
    windows = table.get("windows", [])
    if not isinstance(windows, list) or not all(isinstance(window, list) for window in windows):
        raise RunError(f"quantization.windows is {windows!r}: want a list of [first, last]")
    ramp = table.get("ramp", [])
    if not isinstance(ramp, list) or not all(isinstance(stage, list) for stage in ramp):
        raise RunError(f"quantization.ramp is {ramp!r}: want a list of [last step, recipe]")
    return Schedule(
        table.get("start", 1),
        tuple(map(tuple, windows)),
        table.get("match", "*"),
        table.get("interval", 1),
        tuple(map(tuple, ramp)),
    )


def schedule_table(schedule: Schedule) -> dict[str, Any]:
    """The inverse of `schedule_from_table`, complete."""
    return {
        "start": schedule.start,
        "windows": [list(window) for window in schedule.windows],
        "match": schedule.match,
        "interval": schedule.interval,
        "ramp": [list(stage) for stage in schedule.ramp],
    }


def switching(engine: Trains, model: Any, schedule: Schedule) -> Callable[[int], None]:
    """A function to call before each step. It switches the layers of `model` as `schedule` says.

    Raises:
        RunError: the schedule is not the default one, and no prepared layer matches; or a layer that matches cannot follow it.
        RecipeError, GridError: a recipe of the ramp does not fit the model.
    """
    layers = [layer for layer in engine.layers(model) if layer.stage == "prepared"]
    layers = [layer for layer in layers if fnmatchcase(layer.path, schedule.match)]
    if not layers and schedule != Schedule():
        raise RunError(
            f"quantization: no prepared layer matches {schedule.match!r}: give a pattern of their paths, such as '*'"
        )
    _check_able(layers, schedule)
    known: dict[str, Mode] = {layer.path: layer.mode for layer in layers}
    rules = {layer.path: layer.rule for layer in layers}
    ramp = {name: _rules(engine, model, layers, name) for _, name in schedule.ramp}
    now: dict[str, Rule | None] = dict(rules)

    def before(step: int) -> None:
        mode, name = schedule.mode(step), schedule.recipe(step)
        for layer in layers:
            rule = ramp[name][layer.path] if name else rules[layer.path]
            if now[layer.path] != rule and rule:
                engine.regrid(layer.module, rule)
                now[layer.path] = rule
            if known[layer.path] != mode:
                engine.switch_mode(layer.module, mode)
                known[layer.path] = mode
            if schedule.interval > 1 and mode == "on" and (step - 1) % schedule.interval == 0:
                engine.freeze_values(layer.module, on=True)

    return before


@contextmanager
def on_own_grids(engine: Trains, model: Any, rules: Mapping[str, Rule | None]) -> Iterator[None]:
    """Lets every prepared layer quantize by its rule in `rules`, by path, inside of the block, as converted; adapters, too.

    The schedule's mode and grid of each layer come back after it.
    """
    moved = []
    for layer in engine.layers(model):
        rule = rules.get(layer.path)
        if layer.stage == "prepared" and rule and (layer.mode == "off" or layer.rule != rule):
            moved.append((layer, rule))
        elif layer.adapter and layer.stage == "converted" and layer.rule and layer.mode == "off":
            moved.append((layer, layer.rule))
    for layer, rule in moved:
        _put(engine, layer, rule, "on")
    try:
        yield
    finally:
        for layer, rule in moved:
            _put(engine, replace(layer, rule=rule), layer.rule, layer.mode)


def _put(engine: Trains, layer: Layer, rule: Rule | None, mode: Mode) -> None:
    if rule is not None and layer.rule != rule:
        engine.regrid(layer.module, rule)
    engine.switch_mode(layer.module, mode)


def rules_by_path(engine: Trains, model: Any) -> dict[str, Rule | None]:
    """The rule of every prepared layer of `model`, by path, for `on_own_grids`."""
    return {layer.path: layer.rule for layer in engine.layers(model) if layer.stage == "prepared"}


def _check_able(layers: list[Layer], schedule: Schedule) -> None:
    key = "interval" if schedule.interval > 1 else "ramp" if schedule.ramp else None
    for layer in layers:
        learns = layer.rule is not None and layer.rule.scales != "rule"
        if key and (layer.adapter or learns):
            what = "has an adapter" if layer.adapter else "learns its scales"
            raise RunError(f"quantization.{key}: {layer.path} {what}, and cannot follow it: leave one of them out")


def _rules(engine: Trains, model: Any, layers: list[Layer], name: str) -> dict[str, Rule]:
    """The rule of the recipe `name` for each of `layers`, by path."""
    try:
        return rules_on(engine, model, layers, name)
    except RecipeError as error:
        raise RunError(f"quantization.ramp: {error}") from None
