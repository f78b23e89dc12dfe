"""The converted layers of a model: codes by the rule, learned or fitted, packed by the engine. See `qkit.pipeline`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qkit import fused
from qkit.arrays import check
from qkit.engines.abilities import offers, require
from qkit.engines.layer import Layer
from qkit.engines.mixtures import Mixes, TrainsExperts
from qkit.engines.protocol import Deploys, Modules
from qkit.errors import StageError
from qkit.qtensor import QTensor
from qkit.rules import Rule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qkit.fitting.fits import Fit
    from qkit.grid import Grid


def pack_layers(engine: Modules, model: Any, chosen: list[tuple[Layer, Rule]], fit: "Fit | None") -> dict[str, Any]:
    """The converted form of each chosen layer of `model`, by its path; the model does not change.

    Args:
        fit: how codes are chosen; None: by the rule of their grid.

    Raises:
        StageError: static scales of a layer that was not prepared.
        RangeError: a weight is not finite.
    """
    static = {layer.path: _static(engine, model, layer, rule) for layer, rule in chosen}
    peaks = _peaks(engine, chosen)
    by_rule = [(layer, rule) for layer, rule in chosen if layer.path not in peaks]
    packed = {} if fit else _deploy(engine, by_rule, static)
    codes: dict[str, QTensor[Any]] = {}
    for layer, rule in sorted(chosen, key=lambda one: bool(one[0].tied)):  # owners of shared weights first
        if layer.path in packed:
            continue
        if layer.kind == "experts":
            packed[layer.path] = _pack_experts(engine, model, layer, rule, static[layer.path], fit)
            continue
        owner = packed[layer.tied] if layer.tied else None
        if owner is None:
            q = codes[layer.path] = _codes(engine, model, layer, rule, peaks.get(layer.path), fit)
        else:
            q = codes[layer.tied] if layer.tied in codes else engine.unpack(owner)
        packed[layer.path] = engine.pack(layer.module, q, rule, static=static[layer.path], owner=owner)
    return packed


def correct_heads(engine: Modules, model: Any, layers: Iterable[Layer], fit: "Fit") -> None:
    """Corrects the weights of output heads among the float `layers` of `model`, as the statistics of `fit` want it, in place."""
    for layer in layers:
        if fit.corrects(layer.name):
            weight, names = engine.to_numpy(engine.weight(layer.module)), engine.tensors(model).keys()
            own = f"{layer.path}.weight"
            engine.fill(model, {own: fit.head(weight, layer.name)}, without=names - {own})


def prepared_codes(
    engine: Modules, model: Any, chosen: Iterable[tuple[Layer, Rule]]
) -> "Iterator[tuple[str, QTensor[NDArray[Any]]]]":
    """The codes, in NumPy, that prepared layers would be packed with now, each by its path in files; layers must not be tied.

    Raises:
        RangeError: a weight is not finite.
    """
    from qkit.experts import quantize_experts  # here, so that `import qkit` stays cheap

    chosen = list(chosen)
    peaks = _peaks(engine, chosen)
    for layer, rule in chosen:
        if layer.kind != "experts":
            yield layer.name, _in_numpy(engine, _codes(engine, model, layer, rule, peaks.get(layer.path), None))
            continue
        assert rule.weight is not None
        weights = require(engine, Mixes).experts(layer.module)
        if _learned(layer, rule):
            each = learned_expert_codes(engine, layer, rule.weight, weights)
        else:
            each = quantize_experts(weights, rule.weight, engine)
        for name, several in each.items():
            for number, q in enumerate(several):
                yield f"{layer.name}.{number}.{name}", _in_numpy(engine, q)


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


def _peaks(engine: Modules, chosen: list[tuple[Layer, Rule]]) -> dict[str, float]:
    """Of layers that share a tensor scale with others, the largest magnitude of all of them, by path."""
    sharing = {layer.path: layer.module for layer, rule in chosen if fused.shares(rule.weight)}
    peaks: dict[str, float] = {}
    for group in fused.groups(sharing):
        peak = max(engine.magnitude(engine.weight(sharing[path])) for path in group)
        peaks |= dict.fromkeys(group, peak)
    return peaks


def _codes(
    engine: Modules, model: Any, layer: Layer, rule: Rule, peak: float | None, fit: "Fit | None"
) -> QTensor[Any]:
    from qkit.reference.learned import learned_codes, stored_names  # here, so that `import qkit` stays cheap

    assert rule.weight is not None
    w = engine.weight(layer.module)
    check(engine, w, rule.weight, name=f"{layer.path}.weight")
    if fit is not None:
        return fit.on(_home(engine, w)).quantize(engine.to_numpy(w), rule.weight, path=layer.name, peak=peak)
    if not _learned(layer, rule):
        return engine.quantize(w, rule.weight) if peak is None else engine.quantize(w, rule.weight, peak=peak)
    tensors, prefix = engine.tensors(model), f"{layer.path}." if layer.path else ""
    parameters = {name: engine.to_numpy(tensors[prefix + name]) for name in stored_names(rule.weight, rule.scales)}
    return learned_codes(engine.to_numpy(w), rule.weight, parameters, path=layer.path)


def _pack_experts(
    engine: Modules, model: Any, layer: Layer, rule: Rule, static: "Mapping[str, NDArray[Any]]", fit: "Fit | None"
) -> Any:
    from qkit.experts import quantize_experts  # here, so that `import qkit` stays cheap

    mixing = require(engine, Mixes)
    assert rule.weight is not None
    weights = mixing.experts(layer.module)
    for name, w in weights.items():
        check(engine, w, rule.weight, name=f"{layer.path}.{name}")
    if _learned(layer, rule):
        q = learned_expert_codes(engine, layer, rule.weight, weights)
    elif fit is not None:
        q = _fit_experts(engine, model, layer, rule.weight, weights, fit)
    else:
        q = quantize_experts(weights, rule.weight, engine)
    return mixing.pack_experts(layer.module, q, rule, static=static)


def _fit_experts(
    engine: Modules, model: Any, layer: Layer, grid: "Grid", weights: "Mapping[str, Any]", fit: "Fit"
) -> "dict[str, list[QTensor[Any]]]":
    """The fitted codes of each expert's projections, by the statistics of each expert."""
    from qkit.expert_fits import fit_experts  # here, so that `import qkit` stays cheap
    from qkit.experts import paths_of

    def fitted(w: Any, path: str, peak: float | None) -> QTensor[Any]:
        return fit.on(_home(engine, w)).quantize(engine.to_numpy(w), grid, path=path, peak=peak)

    paths = paths_of(layer.name, layer.projections, engine.config(model))
    return fit_experts(weights, grid, paths, engine.magnitude, fitted)


def _home(engine: Modules, w: Any) -> Modules:
    """The engine on the device of a weight, as in `qkit.fit`."""
    return engine.on(str(w.device)) if hasattr(getattr(w, "device", None), "type") else engine


def learned_expert_codes(
    engine: Modules, layer: Layer, grid: "Grid", weights: "Mapping[str, Any]"
) -> "dict[str, list[QTensor[Any]]]":
    """The codes of each expert's projections on the scales that they have learned."""
    from qkit.reference.learned import learned_codes  # here, so that `import qkit` stays cheap

    learned = require(engine, TrainsExperts).learned_experts(layer.module)
    out: dict[str, list[QTensor[Any]]] = {}
    for name, stack in weights.items():
        parameters = {key: engine.to_numpy(one) for key, one in learned[name].items()}
        out[name] = [
            learned_codes(
                engine.to_numpy(one),
                grid,
                {key: values[number] for key, values in parameters.items()},
                path=f"{layer.path}.{number}.{name}",
            )
            for number, one in enumerate(stack)
        ]
    return out


def _in_numpy(engine: Modules, q: QTensor[Any]) -> "QTensor[NDArray[Any]]":
    return q if hasattr(q.codes, "__array_interface__") else q.map(engine.to_numpy)  # the law's own are NumPy's


def _learned(layer: Layer, rule: Rule) -> bool:
    return layer.stage == "prepared" and rule.scales != "rule"


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
