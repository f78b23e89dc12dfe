"""save and load: a model's adapters, in the files of peft and mlx-lm. The base model of an adapter is checked on loading."""

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from qkit.adapters import expert_files, formats
from qkit.adapters.norms import fill_norms, trained_norms
from qkit.adapters.surgery import able, adapted, base_weights, obstacle, paths_of, put, why_no_gains
from qkit.engines.abilities import require
from qkit.engines.layer import Layer, want_whole
from qkit.engines.mixtures import TrainsExperts
from qkit.engines.protocol import Adapts, Arrays, Modules
from qkit.errors import ArtifactError
from qkit.pipeline import Model
from qkit.qtensor import dtype_of
from qkit.reference.gains import gains_shape
from qkit.reference.merged import Update
from qkit.rules import grid_table


def save(
    model: Any,
    folder: str | Path,
    *,
    layout: formats.Layout = "peft",
    base: str | None = None,
    backend: str | Arrays | None = None,
) -> Path:
    """Writes the adapters of `model`, with a note of the base weights and grids that they were trained on.

    peft and mlx-lm add an adapter to the base's weights and do not round the sum. Their outputs are near to those of the
    trained model, and not the same. They pass by the gains of scales and by norms, which are in files of their own, so that
    outputs differ more where these were learned: merge such an adapter by qkit.

    Args:
        layout: `peft` or `mlx-lm`, whose names and files are used.
        base: name or folder of the base model, for readers that load it themselves.

    Raises:
        StageError: there is no adapter, or the model is sharded.
        ArtifactError: the layout cannot hold these adapters, or the folder holds another's.
    """
    engine, folder = able(model, backend), Path(folder)
    layers = adapted(engine, model)
    want_whole(layers, "save")
    updates: dict[str, Update] = {}
    for layer in layers:
        updates |= _updates(engine, layer)
    notes = {
        path: {
            **_note(engine, layer, name),
            "dithered": updates[path].dithered,
            **({} if updates[path].gains is None else {"gains": True}),
        }
        for layer in layers
        for path, name in paths_of(layer).items()
        if path in updates
    }
    blocks = {layer.path: layer for layer in layers if layer.kind == "experts"}
    if layout == "peft":
        updates, ranks = expert_files.joined(updates, blocks)
        notes |= {path: {**notes.get(path, {}), "ranks": inside} for path, inside in ranks.items()}
    else:
        own = {
            f"{block}.{name}": mine
            for block, layer in blocks.items()
            for name, mine in expert_files.mlx_paths(layer, engine.config(model) or {}).items()
        }
        updates = {own.get(path, path): update for path, update in updates.items()}
    formats.write(folder, updates, layout=layout, base=notes, name=base, norms=trained_norms(engine, model))
    return folder


def load(model: Model, folder: str | Path, *, backend: str | Arrays | None = None) -> Model:
    """`model`, prepared or converted, with the adapter that qkit, peft or mlx-lm wrote to `folder`. Nothing else trains.

    Works in place and returns the model, as `adapt` does.

    Raises:
        ArtifactError: the files are unsound or for another base model: a layer is missing or has another shape. In files that
            qkit wrote, also another grid or type, or other weights.
        StageError: the model is sharded.
        BackendError: the engine has no adapters.
    """
    engine, folder = able(model, backend), Path(folder)
    layers = list(engine.layers(model))
    want_whole(layers, "adapt")
    found = formats.read(folder)
    blocks = {layer.path: layer for layer in layers if layer.kind == "experts"}
    ranks = {path: noted.get("ranks") for path, noted in found.base.items()}
    updates = expert_files.split(found.updates, blocks, ranks, engine.config(model) or {})
    by_path = {path: (layer, name) for layer in layers for path, name in paths_of(layer).items()}
    for path, update in updates.items():
        if path not in by_path:
            known = ", ".join(layer.path for layer in layers if layer.kind == "linear")
            raise ArtifactError(
                f"{folder} is for another base: it updates {path!r}, and the model has {known[:200] or 'no layers'}"
            )
        layer, name = by_path[path]
        if reason := obstacle(layer, layers):
            raise ArtifactError(f"{folder}: {path} cannot take an adapter: {reason}")
        noted = found.base.get(path)
        _check_base(engine, layer, name, update, noted, folder)
        updates[path] = replace(update, dithered=layer.stage == "converted" and bool(noted and noted.get("dithered")))
    model = put(engine, model, updates)
    fill_norms(engine, model, found.norms, folder)
    return model


def _updates(engine: Adapts, layer: Layer) -> dict[str, Update]:
    """The adapters of a layer, by the paths of `paths_of`."""
    if layer.kind != "experts":
        return {layer.path: engine.adapter_update(layer.module)}
    found = require(engine, TrainsExperts).expert_updates(layer.module)
    return {f"{layer.path}.{name}": update for name, update in found.items()}


def _check_base(
    engine: Modules, layer: Layer, name: str, update: Update, noted: dict[str, Any] | None, folder: Path
) -> None:
    path, shape = layer.path if name == "weight" else f"{layer.path}.{name}", layer.weights[name]
    if update.shape != tuple(shape):
        raise ArtifactError(
            f"{folder} is for another base: its {path} is {list(update.shape)}, and the model's is {list(shape)}"
        )
    if update.gains is not None:
        if reason := why_no_gains(layer):
            raise ArtifactError(f"{folder} has gains of scales for {path}, which cannot learn them: {reason}")
        want = gains_shape(layer.rule.weight, update.shape)  # type: ignore[union-attr, arg-type]  # of codes: it has a grid
        if update.gains.shape != want:
            raise ArtifactError(
                f"{folder} is for another base: {path} has gains of {list(update.gains.shape)}, and its scales take {list(want)}"
            )
    if noted is None:
        return
    here = _note(engine, layer, name)
    for what in ("grid", "dtype", "weights"):
        if noted.get(what) != here[what]:
            raise ArtifactError(
                f"{folder} is for another base: {path} was trained with {what} {noted.get(what)}, and the model's has "
                f"{here[what]}: take the base that it was trained on{', in that type' * (what == 'dtype')}"
            )


def _note(engine: Modules, layer: Layer, name: str) -> dict[str, Any]:
    """The marks of a base weight: its grid, its type, and a digest of its values as float32."""
    assert layer.rule is not None
    assert layer.rule.weight is not None
    digest = blake2b(digest_size=16)
    for one in base_weights(engine, layer, name):
        digest.update(np.ascontiguousarray(one).data)
    held = layer.dtype
    if not held:  # an engine that does not say
        whole = layer.stage == "converted"
        held = engine.unpack(layer.module).dtype if whole else dtype_of(engine.weight(layer.module))
    return {"grid": grid_table(layer.rule.weight), "dtype": held, "weights": digest.hexdigest()}
