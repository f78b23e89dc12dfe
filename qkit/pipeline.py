"""prepare, convert, gather and adamw, on any engine. A recipe that does not fit is refused before the model changes."""

import json
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qkit import fused
from qkit.conversion import correct_heads, pack_layers
from qkit.engines.abilities import offers, require, want_honored
from qkit.engines.elsewhere import Remembers, Restores
from qkit.engines.layer import FIT, Layer, want_bare, want_known, want_merged, want_none_lost, want_whole
from qkit.engines.protocol import Arrays, Fuses, Modules, Trains
from qkit.engines.registry import backend as choose
from qkit.engines.registry import backend_of
from qkit.engines.registry import recipe as find_recipe
from qkit.engines.trainer import OFFSET_RATE, AdamWOptions
from qkit.errors import FamilyWarning, StageError
from qkit.overrides import overridden
from qkit.planning import Planned, plan, warn_of_rest
from qkit.rules import Recipe, Rule

if TYPE_CHECKING:
    from pathlib import Path

    from qkit.fitting.fits import Fit, Method

Model = TypeVar("Model")

NOTE = "qkit_note"  #: attribute of a module that the recipe left alone: the reason


def prepare(
    model: Model,
    recipe: "str | Path | Recipe",
    *,
    skip_indivisible: bool = False,
    backend: str | Arrays | None = None,
) -> Model:
    """`model` ready for quantization-aware training: its layers compute with the values of the converted model.

    Works in place and returns the model; a model that is itself one layer gives a new one, of the engine's own class. Master
    weights stay the same parameters under the same names. Gradients pass straight through the rounding.

    A torch model may be sharded by FSDP2 or tensor parallel already, but for experts and learned scales.

    Where peft or mlx-lm have put adapters, the layers inside them are prepared, under the paths that they had without them, and
    the factors of adapters stay float. Warns if the recipe quantizes less than half of the weights.

    Args:
        skip_indivisible: whether layers that do not divide into groups stay in float, whatever the recipe says.

    Raises:
        RecipeError, GridError: the recipe does not fit. As with every error, the model does not change.
        PlanError: the recipe wants learned rounding, which training does not have.
        StageError: the model is prepared or converted already; or experts or learned scales are sharded; or the model has a
            wrapper that qkit does not know.
        BackendError: no engine works on such a model, or the engine does not honour a key of the recipe.
    """
    engine = surgeon(model, backend)
    layers = list(engine.layers(model))
    want_known(layers, "prepare")
    want_mergeable(engine, model, layers, "prepare")
    planned = _plan_on(engine, layers, recipe, "prepare", skip_indivisible)
    want_whole([item.layer for item in planned if item.rule and _needs_whole(item.rule)], "prepare")
    warn_of_family(engine, model)
    chosen = {item.layer.name: item.rule for item in planned if item.rule}
    _want_none_learned([(item.layer, item.rule) for item in planned if item.rule])
    if any(_fuses(group, chosen) for group in fused.groups(chosen)):
        require(engine, Fuses)
    prepared = {item.layer.path: engine.prepare_layer(item.layer.module, item.rule) for item in planned if item.rule}
    _note(planned)
    return cast(Model, fuse(engine, engine.replace(model, prepared)))


def convert(
    model: Model,
    recipe: "str | Path | Recipe | None" = None,
    *,
    fit: "Fit | Method | None" = None,
    skip_indivisible: bool = False,
    backend: str | Arrays | None = None,
) -> Model:
    """`model` with codes in place of weights. Prepared layers remember their rule; a recipe is for unprepared models.

    Works in place and returns the model, as `prepare` does.

    Args:
        fit: how codes are chosen, of an unprepared model: `"search"`, or a `qkit.Fit` with statistics of the model.
        skip_indivisible: as `prepare` takes it.

    Raises:
        StageError: an unprepared model needs a recipe, and a prepared one takes neither a recipe nor a fit. Or the model is
            converted, adapted or sharded; or another library has put wrappers around layers, or plain ones in their places.
        RecipeError, GridError: the recipe does not fit. As with every error, the model does not change.
        PlanError: the statistics have nothing of any layer, or are of inputs on another grid; or rounding should be learned.
        RangeError: a weight is not finite.
        BackendError: no engine works on such a model, or the engine does not honour a key of the recipe.
    """
    engine = surgeon(model, backend)
    layers = list(engine.layers(model))
    prepared = [layer for layer in layers if layer.stage == "prepared"]
    want_whole(layers, "convert")
    want_merged(layers, "convert")
    want_bare(layers, "convert")
    want_none_lost(layers, "convert")
    if fit is not None and prepared:
        way_out = "convert it without fit, or fit the float model"
        raise StageError(f"{prepared[0].path} is prepared, and trained values ship as they were trained: {way_out}")
    if recipe is None:
        if not prepared:
            raise StageError(
                "no layer of this model is prepared: call prepare(model, recipe) before you train it, or convert(model, recipe) "
                "to quantize it as it is"
            )
        planned = [Planned(layer, layer.rule) for layer in prepared]
    else:
        planned = _plan_on(engine, layers, recipe, "convert", skip_indivisible)
    if recipe is not None:
        warn_of_family(engine, model)
    chosen = [(item.layer, item.rule) for item in planned if item.rule]
    if fit is None and not prepared:
        _want_none_learned(chosen)
    opened = _opened(fit, chosen, engine.config(model)) if fit else None
    packed = pack_layers(engine, model, chosen, opened)
    for module in packed.values() if opened else ():
        setattr(module, FIT, json.dumps(opened.describe(), sort_keys=True) if opened else "")
    if opened:
        correct_heads(engine, model, [item.layer for item in planned if not item.rule], opened)
    if recipe is not None:
        _note(planned)
    return cast(Model, engine.replace(model, packed))


def want_mergeable(engine: Modules, model: Any, layers: Iterable[Layer], verb: str) -> None:
    """Refuses adapters of other libraries that their own library cannot merge: the trained model could not be shipped."""
    wrapped = any(layer.wrapper for layer in layers)
    if wrapped and offers(engine, Restores) and (reason := engine.obstacle_to_merge(model)):
        raise StageError(f"cannot {verb}: {reason}: use another adapter")


def warn_of_family(engine: Modules, model: Any) -> None:
    """Warns where files of `model` may hold other names or numbers than other programs expect."""
    if offers(engine, Remembers) and (text := engine.doubts(model)):
        warnings.warn(text, FamilyWarning, stacklevel=3)


def _opened(fit: "Fit | Method", chosen: list[tuple[Layer, Rule]], config: Mapping[str, Any] | None) -> "Fit":
    from qkit.experts import paths_of  # here, so that `import qkit` stays cheap
    from qkit.fitting.fits import open_fit

    rules: dict[str, Rule] = {}
    for layer, rule in chosen:
        experts = paths_of(layer.name, layer.projections, config).values() if layer.kind == "experts" else ()
        rules |= dict.fromkeys(experts or (layer.name,), rule)
    return open_fit(fit, rules)


def _want_none_learned(chosen: list[tuple[Layer, Rule]]) -> None:
    if any(rule.rounding == "learned" for _, rule in chosen):
        from qkit.fitting.fits import want_none_learned  # here, so that `import qkit` stays cheap

        want_none_learned({layer.name: rule for layer, rule in chosen})


def _plan_on(
    engine: Modules, layers: list[Layer], recipe: "str | Path | Recipe", verb: str, skip_indivisible: bool
) -> list[Planned]:
    """The plan for `layers` of a float model, by a recipe that `engine` honours."""
    _want_float(layers, verb)
    found = overridden(find_recipe(recipe), skip_indivisible=skip_indivisible)
    planned = plan(layers, found)
    want_honored(engine, found.rules, verb)
    warn_of_rest(planned, found)
    return planned


def fuse(engine: Modules, model: Any) -> Any:
    """`model`, whose prepared layers, and converted ones with adapters, share tensor scales as servers want; see `qkit.fused`."""
    if offers(engine, Fuses):  # whatever the grids are: a schedule may give the layers others
        layers = [layer for layer in engine.layers(model) if layer.stage == "prepared" or layer.adapter]
        trained = {layer.name: layer.module for layer in layers}
        for group in fused.groups(trained):
            engine.fuse([trained[path] for path in group])
    return model


def _fuses(group: Iterable[str], chosen: Mapping[str, Rule]) -> bool:
    """Whether two or more of a group of layers share a tensor scale."""
    return sum(fused.shares(chosen[path].weight) for path in group) > 1


def gather(model: Model, *, backend: str | Arrays | None = None) -> Model | None:
    """The whole of a model that FSDP2 has sharded, to convert and save: in process 0, on the CPU; None in the others.

    Call it in every process. The sharded model does not change, and the whole one shares no tensor with it. Where the model
    is whole already, every process gets the model itself.

    Raises:
        BackendError: no engine works on such a model.
    """
    return cast("Model | None", surgeon(model, backend).gather(model))


def adamw(
    model: Any,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    offset_lr: float = OFFSET_RATE,
    backend: str | Arrays | None = None,
) -> Any:
    """AdamW (Loshchilov and Hutter, 2019) over the trainable parameters of `model`: an optimizer of its framework.

    On a GPU one kernel updates the master weights of prepared layers and writes their quantized values. Elsewhere, and with
    any other optimizer, the first use after a step computes the values.

    `offset_lr` is the learning rate of learned zero points and exponent offsets. They count whole codes and powers of two, and
    a rate for weights would hardly move them. torch's schedulers scale it as they do `lr`; on MLX, give both a schedule.

    Raises:
        BackendError: no engine works on such a model, or the engine does not train.
    """
    engine = require(surgeon(model, backend), Trains)
    return engine.adamw(model, AdamWOptions(lr, betas, eps, weight_decay, offset_lr))


def surgeon(model: Any, backend: str | Arrays | None) -> Modules:
    """The engine for `model`, which offers modules.

    Raises:
        BackendError: no engine works on `model`, or the engine works on arrays only.
    """
    return require(backend_of(model) if backend is None else choose(backend), Modules)


def _want_float(layers: list[Layer], verb: str) -> None:
    for layer in layers:
        if layer.stage != "float":
            way_out = (
                "call convert(model) without a recipe" if layer.stage == "prepared" else "load the float model again"
            )
            raise StageError(f"cannot {verb} with a recipe: {layer.path} is {layer.stage} already; {way_out}")


def _needs_whole(rule: Rule) -> bool:
    """Whether a layer has to be prepared before it is sharded: stacks of experts, and parameters that are not sharded yet."""
    return rule.kind == "experts" or rule.scales != "rule"


def _note(planned: list[Planned]) -> None:
    for item in planned:
        if item.rule is None and item.layer.kind != "other":
            setattr(item.layer.module, NOTE, item.reason)
