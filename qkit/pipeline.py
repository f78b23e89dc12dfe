"""prepare, convert, gather and adamw, on any engine. A recipe that does not fit is refused before the model changes."""

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qkit import fused
from qkit.arrays import check
from qkit.engines.abilities import offers, require, want_honored
from qkit.engines.elsewhere import Remembers
from qkit.engines.layer import Layer, want_bare, want_known, want_merged, want_none_lost, want_whole
from qkit.engines.mixtures import Mixes
from qkit.engines.protocol import Arrays, Deploys, Fuses, Modules, Trains
from qkit.engines.registry import backend as choose
from qkit.engines.registry import backend_of
from qkit.engines.registry import recipe as find_recipe
from qkit.engines.trainer import OFFSET_RATE, AdamWOptions
from qkit.errors import FamilyWarning, StageError
from qkit.planning import Planned, plan, warn_of_rest
from qkit.qtensor import QTensor
from qkit.rules import Recipe, Rule

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

Model = TypeVar("Model")

NOTE = "qkit_note"  #: attribute of a module that the recipe left alone: the reason


def prepare(model: Model, recipe: "str | Path | Recipe", *, backend: str | Arrays | None = None) -> Model:
    """`model` ready for quantization-aware training: its layers compute with the values of the converted model.

    Works in place and returns the model; a model that is itself one layer gives a new one, of the engine's own class. Master
    weights stay the same parameters under the same names. Gradients pass straight through the rounding.

    Where peft or mlx-lm have put adapters, the layers inside them are prepared, under the paths that they had without them, and
    the factors of adapters stay float. Warns if the recipe quantizes less than half of the weights.

    Raises:
        RecipeError, GridError: the recipe does not fit. As with every error, the model does not change.
        StageError: the model is prepared, converted or sharded already; or it has a wrapper that qkit does not know.
        BackendError: no engine works on such a model, or the engine does not honour a key of the recipe.
    """
    engine = surgeon(model, backend)
    layers = list(engine.layers(model))
    want_whole(layers, "prepare")
    want_known(layers, "prepare")
    planned = _plan_on(engine, layers, recipe, "prepare")
    warn_of_family(engine, model)
    chosen = {item.layer.name: item.rule for item in planned if item.rule}
    if any(_fuses(group, chosen) for group in fused.groups(chosen)):
        require(engine, Fuses)
    prepared = {item.layer.path: engine.prepare_layer(item.layer.module, item.rule) for item in planned if item.rule}
    _note(planned)
    return cast(Model, fuse(engine, engine.replace(model, prepared)))


def convert(model: Model, recipe: "str | Path | Recipe | None" = None, *, backend: str | Arrays | None = None) -> Model:
    """`model` with codes in place of weights. Prepared layers remember their rule; a recipe is for unprepared models.

    Works in place and returns the model, as `prepare` does.

    Raises:
        StageError: an unprepared model needs a recipe, and a prepared one takes none. Or the model is converted, adapted
            or sharded; or another library has put wrappers around layers, or plain layers in the place of prepared ones.
        RecipeError, GridError: the recipe does not fit. As with every error, the model does not change.
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
    if recipe is None:
        if not prepared:
            raise StageError(
                "no layer of this model is prepared: call prepare(model, recipe) before you train it, or convert(model, recipe) "
                "to quantize it as it is"
            )
        planned = [Planned(layer, layer.rule) for layer in prepared]
    else:
        planned = _plan_on(engine, layers, recipe, "convert")
        warn_of_family(engine, model)
    packed = _pack(engine, model, [(item.layer, item.rule) for item in planned if item.rule])
    if recipe is not None:
        _note(planned)
    return cast(Model, engine.replace(model, packed))


def warn_of_family(engine: Modules, model: Any) -> None:
    """Warns where files of `model` may hold other names or numbers than other programs expect."""
    if offers(engine, Remembers) and (text := engine.doubts(model)):
        warnings.warn(text, FamilyWarning, stacklevel=3)


def _plan_on(engine: Modules, layers: list[Layer], recipe: "str | Path | Recipe", verb: str) -> list[Planned]:
    """The plan for `layers` of a float model, by a recipe that `engine` honours."""
    _want_float(layers, verb)
    found = find_recipe(recipe)
    planned = plan(layers, found)
    want_honored(engine, found.rules, verb)
    warn_of_rest(planned, found)
    return planned


def _pack(engine: Modules, model: Any, chosen: list[tuple[Layer, Rule]]) -> dict[str, Any]:
    """The converted form of each layer, by its path."""
    static = {layer.path: _static(engine, model, layer, rule) for layer, rule in chosen}
    peaks = _peaks(engine, chosen)
    packed = _deploy(engine, [(layer, rule) for layer, rule in chosen if layer.path not in peaks], static)
    codes: dict[str, QTensor[Any]] = {}
    for layer, rule in chosen:
        if layer.path in packed:
            continue
        if layer.kind == "experts":
            from qkit.expert_codes import pack_experts  # here, so that `import qkit` stays cheap

            packed[layer.path] = pack_experts(engine, layer, rule, static[layer.path])
            continue
        owner = packed[layer.tied] if layer.tied else None
        if owner is None:
            q = codes[layer.path] = _codes(engine, model, layer, rule, peaks.get(layer.path))
        else:
            q = codes[layer.tied] if layer.tied in codes else engine.unpack(owner)
        packed[layer.path] = engine.pack(layer.module, q, rule, static=static[layer.path], owner=owner)
    return packed


def _deploy(engine: Modules, chosen: list[tuple[Layer, Rule]], static: dict[str, Any]) -> dict[str, Any]:
    """The converted layers, by path, that the engine deploys in one pass; none where it cannot."""
    if not offers(engine, Deploys):
        return {}
    own = [
        (layer, rule)
        for layer, rule in chosen
        if not layer.tied and not _learned(layer, rule) and layer.kind != "experts"
    ]
    made = engine.deploy([(layer.module, rule, static[layer.path]) for layer, rule in own])
    return {layer.path: module for (layer, _), module in zip(own, made, strict=True) if module is not None}


def fuse(engine: Modules, model: Any) -> Any:
    """`model`, whose prepared layers, and converted ones with adapters, share tensor scales as servers want; see `qkit.fused`."""
    if offers(engine, Fuses):  # whatever the grids are: a schedule may give the layers others
        layers = [layer for layer in engine.layers(model) if layer.stage == "prepared" or layer.adapter]
        trained = {layer.name: layer.module for layer in layers}
        for group in fused.groups(trained):
            engine.fuse([trained[path] for path in group])
    return model


def _peaks(engine: Modules, chosen: list[tuple[Layer, Rule]]) -> dict[str, float]:
    """Of layers that share a tensor scale with others, the largest magnitude of all of them, by path."""
    sharing = {layer.path: layer.module for layer, rule in chosen if fused.shares(rule.weight)}
    peaks: dict[str, float] = {}
    for group in fused.groups(sharing):
        peak = max(engine.magnitude(engine.weight(sharing[path])) for path in group)
        peaks |= dict.fromkeys(group, peak)
    return peaks


def _fuses(group: Iterable[str], chosen: Mapping[str, Rule]) -> bool:
    """Whether two or more of a group of layers share a tensor scale."""
    return sum(fused.shares(chosen[path].weight) for path in group) > 1


def _codes(engine: Modules, model: Any, layer: Layer, rule: Rule, peak: float | None) -> QTensor[Any]:
    from qkit.reference.learned import learned_codes, names  # here, so that `import qkit` stays cheap

    assert rule.weight is not None
    w = engine.weight(layer.module)
    check(engine, w, rule.weight, name=f"{layer.path}.weight")
    if not _learned(layer, rule):
        return engine.quantize(w, rule.weight) if peak is None else engine.quantize(w, rule.weight, peak=peak)
    tensors, prefix = engine.tensors(model), f"{layer.path}." if layer.path else ""
    parameters = {name: engine.to_numpy(tensors[prefix + name]) for name in names(rule.weight)}
    return learned_codes(engine.to_numpy(w), rule.weight, parameters, path=layer.path)


def _learned(layer: Layer, rule: Rule) -> bool:
    return layer.stage == "prepared" and rule.scales == "learned"


def _static(engine: Modules, model: Any, layer: Layer, rule: Rule) -> "dict[str, NDArray[Any]]":
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
    if layer.kind == "experts":
        from qkit.expert_inputs import static_experts  # here, so that `import qkit` stays cheap

        seen = require(engine, Mixes).expert_ranges(layer.module)
        return static_experts(rule, {name: engine.to_numpy(one) for name, one in seen.items()}, path=layer.path)
    ranges = {name: engine.to_numpy(tensors[f"{prefix}{name}_range"]) for name in names}
    return static_scales(rule, ranges, path=layer.path)


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


def _note(planned: list[Planned]) -> None:
    for item in planned:
        if item.rule is None and item.layer.kind != "other":
            setattr(item.layer.module, NOTE, item.reason)
