"""adapt and merge: adapters onto the quantized layers of a model and, without loss, into them. Plans first, then swaps."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast
from zlib import crc32

import numpy as np

from qkit.adapters.adapter import Adapter
from qkit.engines.abilities import require
from qkit.engines.layer import Layer, want_whole
from qkit.engines.protocol import Adapts, Arrays, Modules
from qkit.errors import QkitError, StageError
from qkit.pipeline import Model, surgeon
from qkit.reference.merged import Floats, Update, row_norms


def adapt(model: Model, adapter: Adapter, *, backend: str | Arrays | None = None) -> Model:
    """`model` with an adapter on every prepared or converted linear layer that matches; nothing else in it trains any more.

    Works in place and returns the model, as `prepare` does. An adapted layer computes with the value that its grid gives the
    *merged* weight, and gradients pass straight through the grid to the adapter. So what `merge` gives has the codes and the loss
    of the last step, all of them. The merged weight is made in float32, whatever autocast says, and in the same bits by every
    engine (`qkit.reference.merged`); where the base is in 16 bits, it is rounded to them first, as it will be stored.

    A converted layer's codes stay as they are, packed; they are decoded in each forward. Its merged weight is put on its grid
    again, by the forward that is trained: nothing is ever stored on another grid than it was trained on.

    Adapters may be put on several times, by different patterns. The merged weight is made at every call, also in evaluation:
    merge before generating text. On CUDA a converted layer may multiply by a kernel that rounds its products otherwise than the
    adapted one does; codes are the same there, too.

    Raises:
        StageError: no layer matches, or one that does cannot take an adapter: the message says why, and the way out. Or the
            model is sharded: its factors would be whole beside parts of weights.
        BackendError: the engine has no adapters.
    """
    engine = able(model, backend)
    layers = list(engine.layers(model))
    want_whole(layers, "adapt")
    return put(engine, model, {layer.path: _first(engine, layer, adapter) for layer in _chosen(layers, adapter)})


def merge(model: Model, *, backend: str | Arrays | None = None) -> Model:
    """`model` without adapters: prepared and converted layers again, whose weights are the merged ones.

    Works in place and returns the model. Codes and loss are those of the adapted model, exactly (see `adapt`); `qkit.convert`
    comes after, for layers that are prepared. What `adapt` froze stays frozen.

    Raises:
        StageError: there is no adapter, or the model is sharded.
        BackendError: the engine has no adapters.
    """
    engine = able(model, backend)
    want_whole(engine.layers(model), "merge")
    merged = {layer.path: engine.merge_adapter(layer.module) for layer in adapted(engine, model)}
    return cast(Model, engine.replace(model, merged))


def put(engine: Adapts, model: Model, updates: Mapping[str, Update]) -> Model:
    """`model` with the update of each path on its layer, and all else frozen."""
    layers = {layer.path: layer for layer in engine.layers(model)}
    made = {path: engine.adapt(layers[path].module, update) for path, update in updates.items()}
    engine.train_only_adapters(model)
    return cast(Model, engine.replace(model, made))


def able(model: Any, backend: str | Arrays | None) -> Adapts:
    """The engine for `model`, if it can adapt.

    Raises:
        BackendError: it cannot.
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


def base_weight(engine: Modules, layer: Layer) -> Floats:
    """The weight that the adapter of `layer` is added to, [outputs, inputs]: the master, or what the codes mean."""
    if layer.stage == "converted":
        return np.asarray(engine.to_numpy(engine.dequantize(replace(engine.unpack(layer.module), dtype="float32"))))
    return engine.to_numpy(engine.weight(layer.module)).astype(np.float32)


def obstacle(layer: Layer, layers: Iterable[Layer]) -> str:
    """Why `layer`, one of `layers`, cannot take an adapter; empty if it can."""
    if layer.kind == "embedding":
        return "it is an embedding, and adapters are for linear layers"
    if layer.kind == "other":
        return layer.obstacle
    if layer.rule is None or layer.rule.weight is None:
        return "it is not quantized: prepare or convert it by a recipe that speaks of it"
    if layer.rule.scales == "learned":
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


def _chosen(layers: list[Layer], adapter: Adapter) -> list[Layer]:
    """The quantized linear layers that `adapter` matches.

    Raises:
        StageError: there is none, or one of them cannot take it.
    """
    matching = [layer for layer in layers if any(fnmatchcase(layer.path, one) for one in adapter.match)]
    chosen = [layer for layer in matching if layer.kind == "linear" and layer.stage != "float"]
    if not matching:
        known = ", ".join(layer.path for layer in layers[:4])
        raise StageError(f"no layer matches {', '.join(adapter.match)}: there is {known or 'none'}")
    for layer in chosen or matching:
        if reason := obstacle(layer, layers):
            raise StageError(f"{layer.path or 'the model'} cannot take an adapter: {reason}")
    return chosen


def _first(engine: Modules, layer: Layer, adapter: Adapter) -> Update:
    """A uniform by Kaiming with a slope of sqrt(5), as peft draws it: up to 1 / sqrt(inputs) in magnitude. B zero."""
    outputs, inputs = layer.shape
    if adapter.rank > min(layer.shape):
        raise QkitError(f"{layer.path}: rank {adapter.rank} is more than its weight of {outputs} x {inputs} has")
    random = np.random.default_rng([adapter.seed, crc32(layer.path.encode())])  # whatever order an engine has layers in
    a = random.uniform(-(inputs**-0.5), inputs**-0.5, (adapter.rank, inputs)).astype(np.float32)
    b = np.zeros((outputs, adapter.rank), np.float32)
    magnitude = row_norms(base_weight(engine, layer)) if adapter.kind == "dora" else None
    return Update(a, b, adapter.alpha / adapter.rank, magnitude)
