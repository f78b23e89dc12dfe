"""prepare and convert: one recipe over one model, on any engine. Plans first, then swaps: no half-done models."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qkit.arrays import check
from qkit.engines.layer import Layer, want_merged, want_whole
from qkit.engines.protocol import Backend, Deployer
from qkit.engines.registry import backend as choose
from qkit.engines.registry import backend_of
from qkit.engines.registry import recipe as find_recipe
from qkit.engines.trainer import OFFSET_RATE
from qkit.errors import BackendError, GridError, RecipeError, StageError
from qkit.qtensor import QTensor
from qkit.rules import Recipe, Rule

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

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
    owners = {item.layer.path: item for item in reversed(planned)}  # the first of a path
    planned = [_plan_tied(item, owners) if item.layer.tied else item for item in planned]
    spoken = {id(recipe.rule_for(item.layer.path, item.layer.kind)) for item in planned if item.layer.kind != "other"}
    for rule in recipe.rules:
        if rule.weight and id(rule) not in spoken:
            raise RecipeError(
                f"recipe {recipe.name!r}: the rule for {rule.kind} {', '.join(rule.match)} is first for no layer of this "
                f"model, which has {_paths(planned)}"
            )
    return planned


def _plan_layer(layer: Layer, recipe: Recipe) -> Planned:
    if layer.kind == "other":
        return Planned(layer, None, layer.obstacle)
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
    backwards = layer.shape[::-1]  # outputs last
    for grid, shape in ((rule.weight, layer.shape), (rule.activation, layer.shape), (rule.output, backwards)):
        try:
            if grid:
                grid.scale_shape(shape)
        except GridError as error:
            if rule.indivisible == "skip":
                return Planned(layer, None, f"skipped: {error}")
            raise GridError(f'{layer.path}: {error}, or indivisible = "skip"') from None
    return Planned(layer, rule)


def _plan_tied(item: Planned, owners: Mapping[str, Planned]) -> Planned:
    """`item`, whose weight belongs to a layer before it, if both can be quantized as one."""
    layer = item.layer
    owner = owners.get(layer.tied)
    if owner is None:
        return item
    if item.rule and item.rule.scales == "learned":
        raise RecipeError(
            f"{layer.path}: its weight is tied to that of {layer.tied}, and two layers cannot learn one weight's scales: use "
            'scales = "rule", or untie them'
        )
    mine, theirs = (one.rule.weight if one.rule else None for one in (item, owner))
    if mine == theirs and not (item.rule and item.rule.slots):
        return item
    obstacle = f"its weight is tied to that of {layer.tied}"
    if item.rule and item.rule.slots and mine == theirs:
        raise RecipeError(f"{layer.path}: {obstacle}, so that it takes no activation or output grid: drop it")
    if layer.kind == "other":
        raise RecipeError(
            f"{layer.path}: {obstacle}, which the recipe puts on {theirs}, and {layer.obstacle}; leave {layer.tied} alone with a "
            "rule without weight"
        )
    if theirs is None and item.rule and item.rule.indivisible == "skip":
        return Planned(layer, None, f"skipped: {obstacle}, which is left alone")
    raise RecipeError(
        f"{layer.path}: {obstacle}, and one weight is on one grid: the recipe puts {layer.tied} on {theirs or 'none'} and "
        f"{layer.path} on {mine or 'none'}; give both the same weight grid (one rule of kind embedding, one of kind linear), "
        "or leave both alone"
    )


def prepare(model: Any, recipe: "str | Path | Recipe", *, backend: str | Backend | None = None) -> Any:
    """`model` ready for quantisation-aware training: its layers compute with the values they will be deployed with.

    Works in place and returns the model (a new one only where the model is itself one layer). Master weights stay the
    same parameters under the same names; gradients pass straight through the rounding.

    Raises:
        RecipeError, GridError: the recipe does not fit; the model is as it was.
        StageError: the model is prepared, converted or sharded already.
        BackendError: no engine works on such a model.
    """
    engine = surgeon(model, backend)
    layers = list(engine.layers(model))
    want_whole(layers, "prepare")
    _want_float(layers, "prepare")
    planned = plan(layers, find_recipe(recipe))
    fakes = {item.layer.path: engine.fake(item.layer.module, item.rule) for item in planned if item.rule}
    _note(planned)
    return engine.replace(model, fakes)


def convert(model: Any, recipe: "str | Path | Recipe | None" = None, *, backend: str | Backend | None = None) -> Any:
    """`model` with codes in place of weights. Prepared layers remember their rule; a recipe is for unprepared models.

    Works in place and returns the model, as `prepare` does.

    Raises:
        StageError: nothing is prepared and no recipe is given, or the other way round, or the model is converted, adapted
            or sharded.
        RecipeError, GridError, RangeError: the recipe does not fit, or a weight is not finite; the model is as it was.
    """
    engine = surgeon(model, backend)
    layers = list(engine.layers(model))
    prepared = [layer for layer in layers if layer.stage == "prepared"]
    want_whole(layers, "convert")
    want_merged(layers, "convert")
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
    packed = _pack(engine, model, [(item.layer, item.rule) for item in planned if item.rule])
    if recipe is not None:
        _note(planned)
    return engine.replace(model, packed)


def _pack(engine: Backend, model: Any, chosen: list[tuple[Layer, Rule]]) -> dict[str, Any]:
    """The deployed form of each layer, by its path."""
    static = {layer.path: _static(engine, model, layer, rule) for layer, rule in chosen}
    packed = _deploy(engine, chosen, static)
    codes: dict[str, QTensor[Any]] = {}
    for layer, rule in chosen:
        if layer.path in packed:
            continue
        owner = packed[layer.tied] if layer.tied else None
        if owner is None:
            q = codes[layer.path] = _codes(engine, model, layer, rule)
        else:
            q = codes[layer.tied] if layer.tied in codes else engine.unpack(owner)
        packed[layer.path] = engine.pack(layer.module, q, rule, static=static[layer.path], owner=owner)
    return packed


def _deploy(engine: Backend, chosen: list[tuple[Layer, Rule]], static: dict[str, Any]) -> dict[str, Any]:
    """The deployed form of those layers for which the engine makes it at once."""
    if not isinstance(engine, Deployer):
        return {}
    own = [(layer, rule) for layer, rule in chosen if not layer.tied and not _learned(layer, rule)]
    made = engine.deploy([(layer.module, rule, static[layer.path]) for layer, rule in own])
    return {layer.path: module for (layer, _), module in zip(own, made, strict=True) if module is not None}


def _codes(engine: Backend, model: Any, layer: Layer, rule: Rule) -> QTensor[Any]:
    from qkit.engines.learned_codes import learned_codes  # here, so that `import qkit` stays cheap

    assert rule.weight is not None
    w = engine.weight(layer.module)
    check(engine, w, rule.weight, name=f"{layer.path}.weight")
    return (
        learned_codes(engine, model, layer, rule.weight) if _learned(layer, rule) else engine.quantize(w, rule.weight)
    )


def _learned(layer: Layer, rule: Rule) -> bool:
    return layer.stage == "prepared" and rule.scales == "learned"


def _static(engine: Backend, model: Any, layer: Layer, rule: Rule) -> "dict[str, NDArray[Any]]":
    from qkit.reference.ranges import static_names, static_scales  # here, so that `import qkit` stays cheap

    if not (names := static_names(rule)):
        return {}
    if layer.stage != "prepared":
        raise StageError(
            f"{layer.path}: the recipe's range is {rule.range!r}, so that scales come from data: prepare(model, recipe), "
            "run data through it, then convert(model)"
        )
    tensors = engine.tensors(model)
    prefix = f"{layer.path}." if layer.path else ""
    ranges = {name: engine.to_numpy(tensors[f"{prefix}{name}_range"]) for name in names}
    return static_scales(rule, ranges, path=layer.path)


def adamw(
    model: Any,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    offset_lr: float = OFFSET_RATE,
    backend: str | Backend | None = None,
) -> Any:
    """AdamW (Loshchilov and Hutter, 2019) over the trainable parameters of `model`: an optimizer of its framework.

    On a GPU it updates the master weights of prepared layers and writes their quantized values in one kernel; elsewhere, and with
    any other optimizer, the values are made at the first use after a step.

    `offset_lr` is the learning rate of learned zero points and exponent offsets, which count whole codes and powers of two: a
    rate for weights would hardly move them. torch's schedulers scale it as they do `lr`; on MLX, give both a schedule.

    Raises:
        BackendError: no engine works on such a model, or the engine has no optimizer.
    """
    engine = surgeon(model, backend)
    if not hasattr(engine, "adamw"):
        raise BackendError(f"backend {engine.name!r} has no optimizer of its own: use one of {engine.framework}'s")
    return engine.adamw(
        model, learning_rate=lr, betas=betas, eps=eps, weight_decay=weight_decay, offset_learning_rate=offset_lr
    )


def surgeon(model: Any, backend: str | Backend | None) -> Backend:
    """The engine for `model`, which must be one that has modules.

    Raises:
        BackendError: no engine works on it, or only on arrays.
    """
    engine = backend_of(model) if backend is None else choose(backend)
    if not hasattr(engine, "layers"):
        raise BackendError(f"backend {engine.name!r} works on arrays only: it has no modules to prepare or convert")
    return engine


def _want_float(layers: list[Layer], verb: str) -> None:
    for layer in layers:
        if layer.stage != "float":
            way_out = (
                "call convert(model) without a recipe" if layer.stage == "prepared" else "load the float model again"
            )
            raise StageError(f"cannot {verb} with a recipe: {layer.path} is {layer.stage} already; {way_out}")


def _note(planned: list[Planned]) -> None:
    for item in planned:
        if item.rule is None and item.layer.kind != "other":
            setattr(item.layer.module, NOTE, item.reason)


def _paths(planned: list[Planned]) -> str:
    known = [item.layer for item in planned if item.layer.kind != "other"]
    paths = [f"{layer.kind} {layer.path or '(the model itself)'}" for layer in known]
    return ", ".join(paths[:4]) + (", ..." if len(paths) > 4 else "") if paths else "no linear or embedding layers"
