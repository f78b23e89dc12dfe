"""prepare, convert, coverage: one recipe over one model, on any engine. Plans first, then swaps: no half-done models."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from qkit.arrays import check
from qkit.backend import Backend, Layer
from qkit.errors import BackendError, GridError, RecipeError, StageError
from qkit.recipe import Recipe, Rule
from qkit.registry import backend as choose
from qkit.registry import backend_of
from qkit.registry import recipe as find_recipe

if TYPE_CHECKING:
    from pathlib import Path

NOTE = "qkit_note"  #: attribute of a module that was left alone: why


@dataclass(frozen=True, slots=True)
class Planned:
    """What a recipe will do to one layer: a rule, or None and the reason."""

    layer: Layer
    rule: Rule | None
    reason: str = ""


def plan(layers: Iterable[Layer], recipe: Recipe) -> list[Planned]:
    """What `recipe` does to each of `layers`; touches nothing.

    Raises:
        RecipeError: a rule that quantizes matches no layer, or matches one that cannot be quantized.
        GridError: a layer does not divide into groups and the rule does not say "skip".
    """
    planned = [_plan_layer(layer, recipe) for layer in layers]
    spoken = {id(recipe.rule_for(item.layer.path, item.layer.kind)) for item in planned}
    for rule in recipe.rules:
        if rule.weight and id(rule) not in spoken:
            raise RecipeError(
                f"recipe {recipe.name!r}: the rule for {rule.kind} {', '.join(rule.match)} is first for no layer of this "
                f"model, which has {_paths(planned)}"
            )
    return planned


def _plan_layer(layer: Layer, recipe: Recipe) -> Planned:
    rule = recipe.rule_for(layer.path, layer.kind)
    if rule is None:
        return Planned(layer, None, "no rule matches")
    if rule.weight is None:
        return Planned(layer, None, f"left alone by the rule for {', '.join(rule.match)}")
    if layer.obstacle:
        if rule.indivisible == "skip":
            return Planned(layer, None, layer.obstacle)
        raise RecipeError(
            f"{layer.path}: {layer.obstacle}; put a rule without weight before, that matches it, to leave it alone"
        )
    for grid in (rule.weight, rule.activation):
        try:
            if grid:
                grid.scale_shape(layer.shape)
        except GridError as error:
            if rule.indivisible == "skip":
                return Planned(layer, None, f"skipped: {error}")
            raise GridError(f'{layer.path}: {error}, or indivisible = "skip"') from None
    return Planned(layer, rule)


def prepare(model: Any, recipe: "str | Path | Recipe", *, backend: str | Backend | None = None) -> Any:
    """`model` ready for quantisation-aware training: its layers compute with the values they will be deployed with.

    Works in place and returns the model (a new one only where the model is itself one layer). Master weights stay the
    same parameters under the same names; gradients pass straight through the rounding.

    Raises:
        RecipeError, GridError: the recipe does not fit; the model is as it was.
        StageError: the model is prepared or converted already.
        BackendError: no engine works on such a model.
    """
    engine = surgeon(model, backend)
    layers = list(engine.layers(model))
    _want_float(layers, "prepare")
    planned = plan(layers, find_recipe(recipe))
    fakes = {item.layer.path: engine.fake(item.layer.module, item.rule) for item in planned if item.rule}
    _note(planned)
    return engine.replace(model, fakes)


def convert(model: Any, recipe: "str | Path | Recipe | None" = None, *, backend: str | Backend | None = None) -> Any:
    """`model` with codes in place of weights. Prepared layers remember their rule; a recipe is for unprepared models.

    Works in place and returns the model, as `prepare` does.

    Raises:
        StageError: nothing is prepared and no recipe is given, or the other way round, or the model is converted already.
        RecipeError, GridError, RangeError: the recipe does not fit, or a weight is not finite; the model is as it was.
    """
    engine = surgeon(model, backend)
    layers = list(engine.layers(model))
    prepared = [layer for layer in layers if layer.stage == "prepared"]
    if recipe is None:
        if not prepared:
            raise StageError(
                "no layer of this model is prepared: call prepare(model, recipe) before you train it, or convert(model, recipe) "
                "to quantize it as it is"
            )
        planned = [Planned(layer, layer.rule) for layer in prepared]
    else:
        _want_float(layers, "convert")
        planned = plan(layers, find_recipe(recipe))
    packed = {item.layer.path: _pack(engine, item.layer, item.rule) for item in planned if item.rule}
    if recipe is not None:
        _note(planned)
    return engine.replace(model, packed)


def _pack(engine: Backend, layer: Layer, rule: Rule) -> Any:
    assert rule.weight is not None
    w = engine.weight(layer.module)
    check(engine, w, rule.weight, name=f"{layer.path}.weight")
    return engine.pack(layer.module, engine.quantize(w, rule.weight), rule)


@dataclass(frozen=True, slots=True)
class Covered:
    """One row of `coverage`.

    Attributes:
        path, kind, shape: of the layer.
        weight, activation: the grids, as text; empty where there is none.
        state: `prepared`, how it executes once converted, or `left alone: why`.
        bits: stored bits per weight.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    weight: str
    activation: str
    state: str
    bits: float


@dataclass(frozen=True, slots=True)
class Coverage:
    """What happened to every layer. Prints as a table."""

    rows: tuple[Covered, ...]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all the layers listed."""
        weights = sum(prod(row.shape) for row in self.rows)
        return sum(row.bits * prod(row.shape) for row in self.rows) / weights if weights else 0.0

    def __str__(self) -> str:
        cells = [
            (row.path, "x".join(map(str, row.shape)), " @ ".join(filter(None, (row.weight, row.activation))), row.state)
            for row in self.rows
        ]
        widths = [max((len(row[i]) for row in cells), default=0) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in cells
        ]
        return "\n".join([*lines, f"{self.bits_per_weight:.2f} bits per weight"])


def coverage(model: Any, *, backend: str | Backend | None = None) -> Coverage:
    """Every layer of `model`: its grid and how it runs, or that it is left alone and why."""
    engine = surgeon(model, backend)
    return Coverage(tuple(_cover(layer, engine) for layer in engine.layers(model)))


def surgeon(model: Any, backend: str | Backend | None) -> Backend:
    """The engine for `model`, which must be one that has modules.

    Raises:
        BackendError: no engine works on it, or only on arrays.
    """
    engine = backend_of(model) if backend is None else choose(backend)
    if not hasattr(engine, "layers"):
        raise BackendError(f"backend {engine.name!r} works on arrays only: it has no modules to prepare or convert")
    return engine


def _cover(layer: Layer, engine: Backend) -> Covered:
    if layer.rule is None or layer.rule.weight is None:
        reason = getattr(layer.module, NOTE, "") or layer.obstacle
        bits = 8 * engine.weight(layer.module).nbytes / prod(layer.shape)
        return Covered(
            layer.path, layer.kind, layer.shape, "", "", f"left alone: {reason}" if reason else "float", bits
        )
    grid, activation = layer.rule.weight, layer.rule.activation
    state = "prepared" if layer.stage == "prepared" else layer.execution
    bits = grid.bits_per_weight(layer.shape)
    return Covered(layer.path, layer.kind, layer.shape, str(grid), str(activation or ""), state, bits)


def _want_float(layers: list[Layer], verb: str) -> None:
    for layer in layers:
        if layer.stage != "float":
            way_out = (
                "call convert(model) without a recipe" if layer.stage == "prepared" else "load the float model again"
            )
            raise StageError(f"cannot {verb} with a recipe: {layer.path} is {layer.stage} already; {way_out}")


def _note(planned: list[Planned]) -> None:
    for item in planned:
        if item.rule is None:
            setattr(item.layer.module, NOTE, item.reason)


def _paths(planned: list[Planned]) -> str:
    paths = [f"{item.layer.kind} {item.layer.path or '(the model itself)'}" for item in planned]
    return ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "") if paths else "no linear or embedding layers"
