"""save and load: a model's adapters, in the files of peft and mlx-lm. The base model of an adapter is checked on loading."""

from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from qkit.adapters import formats
from qkit.adapters.surgery import able, adapted, base_weight, obstacle, put
from qkit.engines.layer import Layer, want_whole
from qkit.engines.protocol import Arrays, Modules
from qkit.errors import ArtifactError
from qkit.pipeline import Model
from qkit.qtensor import dtype_of
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
    trained model, and not the same.

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
    updates = {layer.path: engine.adapter_update(layer.module) for layer in layers}
    notes = {layer.path: _note(engine, layer) for layer in layers}
    formats.write(folder, updates, layout=layout, base=notes, name=base)
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
    by_path = {layer.path: layer for layer in layers}
    for path, update in found.updates.items():
        if path not in by_path:
            known = ", ".join(layer.path for layer in layers if layer.kind == "linear")
            raise ArtifactError(
                f"{folder} is for another base: it updates {path!r}, and the model has {known[:200] or 'no layers'}"
            )
        if reason := obstacle(by_path[path], layers):
            raise ArtifactError(f"{folder}: {path} cannot take an adapter: {reason}")
        _check_base(engine, by_path[path], update, found.base.get(path), folder)
    return put(engine, model, found.updates)


def _check_base(engine: Modules, layer: Layer, update: Update, noted: dict[str, Any] | None, folder: Path) -> None:
    if update.shape != layer.shape:
        raise ArtifactError(
            f"{folder} is for another base: its {layer.path} is {list(update.shape)}, and the model's is {list(layer.shape)}"
        )
    if noted is None:
        return
    here = _note(engine, layer)
    for what in ("grid", "dtype", "weights"):
        if noted.get(what) != here[what]:
            raise ArtifactError(
                f"{folder} is for another base: {layer.path} was trained with {what} {noted.get(what)}, and the model's has "
                f"{here[what]}: take the base that it was trained on{', in that type' * (what == 'dtype')}"
            )


def _note(engine: Modules, layer: Layer) -> dict[str, Any]:
    """The marks of a base layer: its grid, its type, and a digest of its weights as float32."""
    assert layer.rule is not None
    assert layer.rule.weight is not None
    held = engine.unpack(layer.module).dtype if layer.stage == "converted" else dtype_of(engine.weight(layer.module))
    digest = blake2b(np.ascontiguousarray(base_weight(engine, layer)).data, digest_size=16).hexdigest()
    return {"grid": grid_table(layer.rule.weight), "dtype": held, "weights": digest}
