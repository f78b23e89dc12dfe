"""adapt and merge: adds adapters to the quantized layers of a model, and merges them without loss. Plans before it changes."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast
from zlib import crc32

import numpy as np

from qkit import fused
from qkit.adapters.adapter import Adapter
from qkit.adapters.norms import train_norms
from qkit.engines.abilities import require
from qkit.engines.elsewhere import Restores
from qkit.engines.layer import FIT, Layer, want_bare, want_known, want_whole
from qkit.engines.mixtures import Mixes, TrainsExperts
from qkit.engines.protocol import Adapts, Arrays, Modules
from qkit.errors import QkitError, StageError
from qkit.pipeline import Model, fuse, surgeon, want_mergeable
from qkit.reference.gains import gains_shape, takes_gains
from qkit.reference.merged import Floats, Update, dithered, row_norms

FEW = 3  #: bits of codes, up to which a row has too few values for what an adapter learns, so that its scales train too


def adapt(model: Model, adapter: Adapter, *, backend: str | Arrays | None = None) -> Model:
    """`model` with an adapter on every prepared or converted linear layer that matches. Else only norms train from then on.

    Of a mixture every expert gets factors of its own, for each of its projections.

    Works in place and returns the model, as `prepare` does. An adapted layer computes with its grid's value of the *merged*
    weight, and gradients pass straight through the grid to the adapter. The merged model therefore has the codes and the loss
    of the last step. Every engine computes the merged weight in float32, in the same bits (`qkit.reference.merged`). Where the
    base is in 16 bits, the merged weight is rounded to them first, as in files.

    The norms around converted layers train, too, unless `adapter.norms` says otherwise: they are float in every file, so that the
    merge leaves them as they are.

    A converted layer keeps its packed codes, and each forward decodes them. Each forward also puts the merged weight on the
    grid, so that the trained and the stored weights are on the same grid.

    Call it several times for several patterns. Each call of the model computes the merged weight, also in evaluation: merge
    before generating text. On CUDA a converted layer may use a kernel that rounds products differently from the adapted one;
    the codes are the same.

    Raises:
        StageError: no layer matches, or one that does cannot take an adapter. Or the model is sharded: the factors would be
            whole beside parts of weights. Or only some of the converted layers that share a tensor scale match.
        BackendError: the engine has no adapters.
    """
    engine = able(model, backend)
    layers = list(engine.layers(model))
    want_whole(layers, "adapt")
    want_bare(layers, "adapt")
    chosen = _chosen(layers, adapter)
    _want_together(layers, {layer.path for layer in chosen})
    model = put(engine, model, {path: one for layer in chosen for path, one in _first(engine, layer, adapter).items()})
    train_norms(engine, model, adapter)
    return model


def merge(model: Model, *, backend: str | Arrays | None = None) -> Model:
    """`model` without adapters: its layers are prepared or converted ones again, with the merged weights.

    Works in place and returns the model. Its codes and loss are exactly those of the adapted model, see `adapt`. Call
    `qkit.convert` afterwards if the layers are prepared. Parameters that `adapt` froze stay frozen.

    Also merges what peft and mlx-lm have put around layers, and returns the model inside of peft's. Such adapters were trained
    beside the grid, so that their merge moves the loss.

    Raises:
        StageError: there is no adapter, the model is sharded, or it has a wrapper that qkit does not know.
        BackendError: the engine has no adapters.
    """
    engine = able(model, backend)
    layers = list(engine.layers(model))
    want_whole(layers, "merge")
    want_known(layers, "merge")
    want_mergeable(engine, model, layers, "merge")
    bare: Any = model
    if any(layer.wrapper for layer in layers):
        _check_updates(layers)
        _want_together(layers, {layer.path for layer in layers if layer.wrapper})
        bare, updates = require(engine, Restores).unwrap(model)
        found = {layer.path: layer for layer in engine.layers(bare)}
        bare = engine.replace(bare, {path: engine.adapt(found[path].module, one) for path, one in updates.items()})
    else:
        adapted(engine, model)
    merged = {layer.path: engine.merge_adapter(layer.module) for layer in engine.layers(bare) if layer.adapter}
    for module in merged.values():
        setattr(module, FIT, "")  # the merge chose its codes by the rule
    return cast(Model, fuse(engine, engine.replace(bare, merged)))


def _check_updates(layers: list[Layer]) -> None:
    """Refuses wrappers of converted layers that the adapters of qkit could not be on."""
    for layer in layers:
        if layer.wrapper and layer.stage == "converted" and (reason := obstacle(layer, layers)):
            raise StageError(f"cannot merge the {layer.wrapper} of {layer.path}: {reason}")


def _want_together(layers: Iterable[Layer], chosen: Collection[str]) -> None:
    """Refuses adapters on some of the converted layers that share a tensor scale: a merge would give these another one."""
    sharing = {
        layer.path: layer
        for layer in layers
        if layer.stage == "converted" and layer.rule and fused.shares(layer.rule.weight)
    }
    for group in fused.groups(path for path, layer in sharing.items() if layer.kind == "linear"):
        without = [path for path in group if path not in chosen]
        if without and len(without) < len(group):
            mine = next(path for path in group if path in chosen)
            raise StageError(
                f"{mine} cannot take an adapter alone: its codes share a tensor scale with {', '.join(without)}, which a merge "
                "would change: adapt them in the same call, or adapt the float model after prepare"
            )


def put(engine: Adapts, model: Model, updates: Mapping[str, Update]) -> Model:
    """`model` with the update of each path, of a layer or of a projection of experts, and every other parameter frozen."""
    made = {}
    for layer in engine.layers(model):
        mine = {name: updates[path] for path, name in paths_of(layer).items() if path in updates}
        if mine and layer.kind == "experts":
            made[layer.path] = require(engine, TrainsExperts).adapt_experts(layer.module, _both(mine, layer))
        elif mine:
            made[layer.path] = engine.adapt(layer.module, mine["weight"])
    engine.train_only_adapters(model)
    return cast(Model, fuse(engine, engine.replace(model, made)))


def _both(updates: Mapping[str, Update], layer: Layer) -> Mapping[str, Update]:
    """`updates` of experts; one of gate or up alone, where both share a tensor scale, gets another that stays zero beside it."""
    assert layer.rule is not None
    pair = [name for name in ("gate_proj", "up_proj") if name in layer.projections]
    absent = [name for name in pair if name not in updates]
    if not fused.shares(layer.rule.weight) or len(absent) != 1 or len(pair) == 1:
        return updates
    given = next(updates[name] for name in pair if name in updates)
    nothing = Update(np.zeros_like(given.a), np.zeros_like(given.b), given.scale, dithered=given.dithered)
    return {**updates, absent[0]: nothing}


def paths_of(layer: Layer) -> dict[str, str]:
    """The path of each weight of a layer that adapters know, and its name in `Layer.weights`."""
    return {layer.path if name == "weight" else f"{layer.path}.{name}": name for name in layer.weights}


def able(model: Any, backend: str | Arrays | None) -> Adapts:
    """The engine for `model`, which offers adapters.

    Raises:
        BackendError: it does not.
    """
    return require(surgeon(model, backend), Adapts)


def adapted(engine: Modules, model: Any) -> list[Layer]:
    """The layers with adapters.

    Raises:
        StageError: there is none.
    """
    if found := [layer for layer in engine.layers(model) if layer.adapter]:
        return found
    raise StageError("no layer of this model has an adapter: call qkit.adapt(model, qkit.Adapter()) first")


def base_weights(engine: Modules, layer: Layer, name: str, *, spread: bool = False) -> Iterator[Floats]:
    """The base of adapters on the weight `name` of `layer`, [outputs, inputs]: the master weight, or the values of the codes.

    With `spread`, these are spread within their cells, as `Update.dithered` says: see `reference.merged.dithered`.

    Of experts one after the other, so that all of them are never in memory as values.
    """
    if layer.kind == "experts":
        mixing = require(engine, Mixes)
        if layer.stage == "converted":
            codes: Any = mixing.unpack_experts(layer.module)[name]
        else:
            codes = mixing.experts(layer.module)[name]
    else:
        codes = [engine.unpack(layer.module) if layer.stage == "converted" else engine.weight(layer.module)]
    for one in codes:
        if layer.stage == "converted" and spread:
            yield dithered(one.map(lambda array: np.asarray(engine.to_numpy(array))))
        elif layer.stage == "converted":
            yield np.asarray(engine.to_numpy(engine.dequantize(replace(one, dtype="float32"))))
        else:
            yield engine.to_numpy(one).astype(np.float32)


def obstacle(layer: Layer, layers: Iterable[Layer]) -> str:
    """Why `layer`, one of `layers`, cannot take an adapter; empty if it can."""
    if layer.kind == "embedding":
        return "it is an embedding, and adapters are for linear layers"
    if layer.kind == "other":
        return layer.obstacle
    if layer.rule is None or layer.rule.weight is None:
        return "it is not quantized: prepare or convert it by a recipe that speaks of it"
    if layer.rule.scales != "rule":
        return "its scales are learned, and a merge would choose others: leave it out, or use a recipe with the grid's rule"
    if layer.adapter:
        return f"it has an adapter already ({layer.adapter}): merge that first"
    tied = [layer.tied] * bool(layer.tied) + [other.path for other in layers if other.tied == layer.path]
    if tied:
        return (
            f"its weight is also that of {tied[0]}, and a merge would tear them apart: leave it out, or untie the model"
        )
    if layer.stage == "converted" and layer.rule.weight.scale == "midmax":
        return (
            f"its codes are on {layer.rule.weight}, where values that are quantized again move, since each group's maximum "
            "lies on a tie: adapt the float model after prepare, or a base on another scale rule"
        )
    return ""


def why_no_gains(layer: Layer) -> str:
    """Why the scales of `layer` cannot train beside the factors of its adapter; empty if they can."""
    grid = layer.rule.weight if layer.rule else None
    if layer.kind != "linear":
        return f"it is {layer.kind}, and only linear layers do: leave it out, or leave out scales"
    if grid is None or layer.stage != "converted":
        return 'it has no codes yet, and its scales follow from its weight: use a recipe with scales = "learned"'
    if not takes_gains(grid):
        return f"on {grid} a row has no floats for scales: leave it out, or leave out scales"
    if layer.rule and layer.rule.activation:
        return f"its inputs are on {layer.rule.activation}, and codes are multiplied: leave it out, or leave out scales"
    return ""


def _learns_scales(adapter: Adapter, layer: Layer) -> bool:
    """Whether the scales of `layer` train: those of a file, and of few bits, unless `adapter` says otherwise."""
    grid = layer.rule.weight if layer.rule else None
    default = grid is not None and (grid.read or grid.element.bits <= FEW)
    return (adapter.scales == "learned" or (adapter.scales is None and default)) and not why_no_gains(layer)


def _chosen(layers: list[Layer], adapter: Adapter) -> list[Layer]:
    """The quantized linear layers and experts that `adapter` matches.

    Raises:
        StageError: there is none, or one of them cannot take it.
    """
    matching = [layer for layer in layers if any(fnmatchcase(layer.path, one) for one in adapter.match)]
    chosen = [layer for layer in matching if layer.kind in ("linear", "experts") and layer.stage != "float"]
    if not matching:
        known = ", ".join(layer.path for layer in layers[:4])
        raise StageError(f"no layer matches {', '.join(adapter.match)}: there is {known or 'none'}")
    for layer in chosen or matching:
        if reason := obstacle(layer, layers):
            raise StageError(f"{layer.path or 'the model'} cannot take an adapter: {reason}")
        if adapter.scales == "learned" and (reason := why_no_gains(layer)):
            raise StageError(f"{layer.path or 'the model'} cannot learn its scales: {reason}")
    return chosen


def _columns(adapter: Adapter, layer: Layer) -> int:
    grid = layer.rule.weight if layer.rule else None
    packed = layer.stage == "converted" and layer.kind == "linear"
    return adapter.columns(grid) if packed and grid is not None else adapter.rank


def _first(engine: Modules, layer: Layer, adapter: Adapter) -> dict[str, Update]:
    """A uniform by Kaiming with a slope of sqrt(5), as peft draws it: up to 1 / sqrt(inputs) in magnitude. B zero."""
    first = {}
    for path, name in paths_of(layer).items():
        *experts, outputs, inputs = layer.weights[name]
        if adapter.rank > min(outputs, inputs):
            raise QkitError(f"{path}: rank {adapter.rank} is more than its weight of {outputs} x {inputs} has")
        random = np.random.default_rng([adapter.seed, crc32(path.encode())])  # whatever order an engine has layers in
        columns = min(_columns(adapter, layer), outputs, inputs)
        a = random.uniform(-(inputs**-0.5), inputs**-0.5, (*experts, columns, inputs)).astype(np.float32)
        b = np.zeros((*experts, outputs, columns), np.float32)
        magnitude = gains = None
        if _learns_scales(adapter, layer):
            assert layer.rule is not None
            assert layer.rule.weight is not None
            gains = np.zeros(gains_shape(layer.rule.weight, (outputs, inputs)), np.float32)
        if adapter.kind == "dora":
            bases = base_weights(engine, layer, name, spread=layer.stage == "converted")
            magnitude = np.concatenate([row_norms(one) for one in bases])
            magnitude = magnitude.reshape(*experts, outputs)
        first[path] = Update(a, b, adapter.alpha / adapter.rank, magnitude, layer.stage == "converted", gains)
    return first
