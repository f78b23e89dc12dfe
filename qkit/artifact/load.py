"""`load`: a Hugging Face directory in compressed-tensors layout to a model on any engine."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from numpy.typing import NDArray

from qkit.artifact.config import CONFIG, float_config, read_config
from qkit.artifact.foreign import check_float
from qkit.artifact.further import predicts_further
from qkit.artifact.known import based, missing_base
from qkit.artifact.load_experts import stack_experts, take_experts
from qkit.artifact.metadata import KEY, StoredRule, fit_of, kind_of, read_rules
from qkit.engines.abilities import offers, require, want_honored
from qkit.engines.elsewhere import Remembers
from qkit.engines.layer import FIT, Layer
from qkit.engines.mixtures import Mixes
from qkit.engines.protocol import Arrays, Builds, Modules
from qkit.engines.registry import backend as choose
from qkit.engines.translation import Translates
from qkit.errors import ArtifactError, GridError
from qkit.formats import compressed_tensors
from qkit.formats.packed import join
from qkit.pipeline import NOTE, Model, surgeon, warn_of_family
from qkit.qtensor import DTYPES, QTensor
from qkit.reference.ranges import check_static, static_contents
from qkit.rules import Rule
from qkit.storage.read import map_tensors, read_folder
from qkit.storage.seal import check_seal


@overload
def load(folder: str | Path, *, backend: str | Arrays | None = None, into: Model) -> Model: ...
@overload
def load(folder: str | Path, *, backend: str | Arrays | None = None, into: None = None) -> Any: ...
def load(folder: str | Path, *, backend: str | Arrays | None = None, into: Any = None) -> Any:
    """The model in `folder`, float or converted, on an engine.

    Args:
        backend: the engine. The default is the engine of `into`, or the first that is ready.
        into: a float model to fill; its layers are found by their paths. By default, the engine builds one from
            `config.json`.

    Raises:
        ArtifactError: a file is missing or unsound, differs from its digest in `qkit.json`, or does not fit the model.
        BackendError: the engine is missing, cannot build such a model, or does not honour a key of its rules.
    """
    folder = Path(folder)
    engine = require(choose(backend), Modules) if into is None else surgeon(into, backend)
    stored, metadata = read_folder(folder)
    check_seal(folder, stored, digests=True)
    arrays = map_tensors(stored)
    config = read_config(folder)
    if KEY not in metadata:
        check_float(folder, stored, config)
    rules = read_rules(folder, metadata, config)
    inference = [replace(one.rule, ste="identity", scales="rule") for one in rules]  # two keys matter in training alone
    want_honored(engine, inference, f"load {folder}")
    model = _build(engine, folder, config, arrays) if into is None else into
    warn_of_family(engine, model)
    layers = {layer.path: layer for layer in engine.layers(model)}
    for layer in layers.values():
        if layer.stage != "float":
            raise ArtifactError(f"{folder}: {layer.path} is {layer.stage} already: load into the float model")
    arrays, rules = _of_the_model(arrays, rules, config)
    mixed = take_experts(folder, arrays, layers, rules, config)
    arrays, rules = _translate(engine, folder, model, arrays, [one for one in rules if one.rule.kind != "experts"])
    taken = {path: _take(folder, arrays, path, layers, one) for one in rules for path in one.paths}
    stack_experts(engine, folder, arrays, layers, config)
    without = {join(path, "weight") for path in taken} | {name for path in mixed for name in layers[path].stored}
    try:
        engine.fill(model, arrays, without=without)
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from None
    packed: dict[str, Any] = {}
    for path, layer in sorted(layers.items(), key=lambda one: bool(one[1].tied)):  # owners of shared weights first
        if layer.kind != "other":
            setattr(layer.module, NOTE, "float in the artifact")
        if layer.tied and layer.tied in taken:
            rule = Rule(("*",), kind=kind_of(layer), weight=taken[layer.tied].rule.weight)
            packed[path] = engine.pack(layer.module, taken[layer.tied].q, rule, owner=packed[layer.tied])
        elif path in mixed:
            q, rule, static = mixed[path]
            packed[path] = require(engine, Mixes).pack_experts(layer.module, q, rule, static=static)
        elif path in taken:
            packed[path] = engine.pack(layer.module, taken[path].q, taken[path].rule, static=taken[path].static)
    fit = fit_of(metadata)
    for module in packed.values() if fit else ():
        setattr(module, FIT, json.dumps(fit, sort_keys=True))
    return engine.replace(model, packed)


def _build(engine: Arrays, folder: Path, config: Mapping[str, Any] | None, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """The model of `config`; without a type there, in that of the first float tensor of the files, as transformers has it."""
    if config is None:
        raise ArtifactError(f"{folder} has no {CONFIG}: pass into= a model to fill")
    known = float_config(config)
    if not (known.get("dtype") or known.get("torch_dtype")):
        found = next((name for array in arrays.values() if (name := array.dtype.name) in DTYPES), None)
        known = known if found is None else {**known, "dtype": found}
    model = require(engine, Builds).build(known)
    if offers(engine, Remembers):
        engine.remember_origin(model, str(folder.absolute()))
    return model


def _of_the_model(
    arrays: dict[str, NDArray[Any]], rules: Sequence[StoredRule], config: Mapping[str, Any] | None
) -> tuple[dict[str, NDArray[Any]], list[StoredRule]]:
    """The arrays and the rules under the names of a model with a head, without modules that predict further tokens."""
    base = missing_base(arrays, config)
    kept = {based(name, base): array for name, array in arrays.items() if not predicts_further(name, config)}
    return kept, [
        replace(one, paths=tuple(based(path, base) for path in one.paths if not predicts_further(f"{path}.", config)))
        for one in rules
    ]


def _translate(
    engine: Modules, folder: Path, model: Any, arrays: dict[str, NDArray[Any]], rules: Sequence[StoredRule]
) -> tuple[dict[str, NDArray[Any]], list[StoredRule]]:
    """The arrays and the rules of files under the names of `model`."""
    if not offers(engine, Translates):
        return arrays, list(rules)
    owned = {
        join(path, name): path
        for one in rules
        for path in one.paths
        for name in (
            *compressed_tensors.NAMES,
            *compressed_tensors.server_tensors(one.rule),
            *static_contents(one.rule),
        )
    }
    shapes = {path: _shape(arrays, path, one) for one in rules for path in one.paths}
    others = {name: array for name, array in arrays.items() if name not in owned}
    try:
        found, paths = engine.translate(model, others, shapes)
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from None
    for name, path in owned.items():
        if name in arrays and path in paths:
            found[join(paths[path], name.removeprefix(path).lstrip("."))] = arrays[name]
    mine = [replace(one, paths=tuple(paths[path] for path in one.paths if path in paths)) for one in rules]
    return found, mine


def _shape(arrays: Mapping[str, NDArray[Any]], path: str, stored: StoredRule) -> tuple[int, ...]:
    """Shape of the weight at `path`; (0, 0) where a tensor is missing, which `_take` refuses by name."""
    assert stored.rule.weight is not None
    mine = {name: arrays[join(path, name)] for name in compressed_tensors.NAMES if join(path, name) in arrays}
    try:
        return compressed_tensors.shape_of(mine, stored.rule.weight)
    except (KeyError, ValueError):
        return (0, 0)


@dataclass(frozen=True, slots=True)
class _Taken:
    """The codes, the rule and the static scales that an artifact has for one layer."""

    q: QTensor[Any]
    rule: Rule
    static: dict[str, NDArray[Any]]


def _take(
    folder: Path, arrays: dict[str, NDArray[Any]], path: str, layers: Mapping[str, Layer], stored: StoredRule
) -> _Taken:
    """The codes and static scales of the layer at `path`. Removes their tensors from `arrays`."""
    layer, grid = layers.get(path), stored.rule.weight
    if layer is None or grid is None:
        way_out = "load into the model of its config.json"
        raise ArtifactError(f"{folder}: the model has no layer {path!r} to hold its codes: {way_out}")
    if layer.stage == "converted" or layer.obstacle or layer.tied:
        raise ArtifactError(f"{folder}: {path} cannot take its codes: {_why_not(layer)}")
    try:
        there = {name for name in compressed_tensors.NAMES if join(path, name) in arrays}
        form = compressed_tensors.stored_form(there, grid)
        names = compressed_tensors.contents(grid, dtype=stored.dtype, shape=layer.shape, form=form)
        found = {name: arrays.pop(join(path, name)) for name in names if join(path, name) in arrays}
        q = compressed_tensors.from_tensors(found, grid=grid, dtype=stored.dtype, shape=layer.shape)
        for name in compressed_tensors.server_tensors(stored.rule):
            arrays.pop(join(path, name), None)
        static = {name: arrays.pop(join(path, name), None) for name in static_contents(stored.rule)}
        return _Taken(q, stored.rule, check_static(static, stored.rule))
    except (ArtifactError, GridError) as error:
        raise ArtifactError(f"{folder}: {path}: {error}") from None


def _why_not(layer: Layer) -> str:
    if layer.stage == "converted":
        return "it is converted already"
    return layer.obstacle or f"its weight is that of {layer.tied}"
