"""regrid and unprepare: a prepared model on other grids, or on none."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

from qkit.engines.abilities import offers, require, want_honored
from qkit.engines.elsewhere import Restores
from qkit.engines.layer import Layer, want_merged, want_whole
from qkit.engines.protocol import Arrays, Fuses, Modules, Trains
from qkit.engines.registry import recipe as find_recipe
from qkit.errors import RecipeError, StageError
from qkit.pipeline import Model, fuse, surgeon
from qkit.planning import plan
from qkit.rules import Recipe, Rule

if TYPE_CHECKING:
    from pathlib import Path


def regrid(model: Model, recipe: "str | Path | Recipe", *, backend: str | Arrays | None = None) -> Model:
    """The prepared `model` on the grids of another recipe that quantizes the same layers. Works in place and returns the model.

    Master weights, the names of parameters and the state of the optimizer stay.

    Raises:
        StageError: nothing is prepared, a layer has an adapter inside of its grid, or it learns its scales.
        RecipeError, GridError: the recipe does not fit, or it quantizes other layers, learns scales, or has other static ranges.
        BackendError: the engine does not train, or does not honour a key of the recipe.
    """
    engine = require(surgeon(model, backend), Trains)
    layers = _prepared(engine.layers(model))
    for layer in layers:
        learns = layer.rule is not None and layer.rule.scales != "rule"
        if layer.adapter or learns:
            what = "an adapter" if layer.adapter else "learned scales"
            raise StageError(f"cannot regrid: {layer.path} has {what}, which belong to its grid")
    rules = rules_on(engine, model, layers, recipe)
    for layer in layers:
        engine.regrid(layer.module, rules[layer.path])
    return model


def rules_on(engine: Modules, model: Any, layers: Iterable[Layer], recipe: "str | Path | Recipe") -> dict[str, Rule]:
    """The rule of `recipe` for each of the prepared `layers` of `model`, by path.

    Raises:
        RecipeError: the recipe leaves one of them alone, learns its scales, or has other static ranges.
    """
    from qkit.reference.ranges import static_names  # here, so that `import qkit` stays cheap

    found = find_recipe(recipe)
    planned = {item.layer.path: item.rule for item in plan(engine.layers(model), found)}
    want_honored(engine, found.rules, "regrid")
    made: dict[str, Rule] = {}
    for layer in layers:
        rule = planned[layer.path]
        assert layer.rule is not None
        if rule is None or rule.scales != "rule" or static_names(rule).keys() != static_names(layer.rule).keys():
            what = "leaves it alone" if rule is None else "learns scales, or has other static ranges"
            raise RecipeError(f"{layer.path}: {found.name!r} {what}, unlike the recipe it is on: choose another")
        made[layer.path] = rule
    return made


def unprepare(model: Model, match: str = "*", *, backend: str | Arrays | None = None) -> Model:
    """`model` with plain float layers in place of the prepared ones whose path matches the shell pattern.

    Works in place and returns the model; a model that is itself one layer gives a new one. The master weights stay the same
    parameters under the same names. Learned scales and static ranges are gone.

    Raises:
        StageError: no prepared layer matches, or one has an adapter inside of its grid, or the model is sharded.
        BackendError: the engine cannot do that.
    """
    engine = require(surgeon(model, backend), Restores)
    layers = list(engine.layers(model))
    lost = {layer.path: layer.module for layer in layers if layer.lost and fnmatchcase(layer.name, match)}
    chosen = [layer for layer in layers if layer.stage == "prepared" and fnmatchcase(layer.name, match)]
    if not chosen and not lost:
        _prepared(layers)
        raise StageError(f"no prepared layer matches {match!r}: there is {', '.join(one.name for one in layers[:4])}")
    want_whole(chosen, "unprepare")
    want_merged(chosen, "unprepare")
    plain = {layer.path: engine.restore_layer(layer.module) for layer in chosen}
    model = cast(Model, engine.replace(model, {**lost, **plain}))
    if offers(engine, Fuses):
        for layer in engine.layers(model):
            if layer.stage == "prepared":
                engine.fuse([layer.module])  # takes it out of the group that it was in
    return cast(Model, fuse(engine, model))


def _prepared(layers: Iterable[Layer]) -> list[Layer]:
    if found := [layer for layer in layers if layer.stage == "prepared"]:
        return found
    raise StageError("no layer of this model is prepared: call prepare(model, recipe) first")
