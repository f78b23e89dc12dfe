"""The float model and the recipe behind a trained artifact, so that a report can put its weights on another grid."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qkit.engines.abilities import require
from qkit.engines.mixtures import Mixes
from qkit.engines.protocol import Builds
from qkit.errors import ArtifactError, StageError
from qkit.rules import Recipe, Rule
from qkit.storage.arrays import read_file
from qkit.training.checkpoint import KEY, PATTERN, file_of
from qkit.training.folder import LOG, read_log, run_folder_of

WEIGHTS = "weights."  #: prefix of the names of weights in a checkpoint


def fill_with_values(engine: Builds, model: Any, *, into: Any) -> Any:
    """Fills `into`, a float model of the same architecture, with the values of the converted `model`, and returns it.

    Raises:
        ArtifactError: the two have other tensors.
    """
    names = engine.tensors(into).keys()
    found = {name: engine.to_numpy(array) for name, array in engine.tensors(model).items() if name in names}
    floats = {layer.path: layer for layer in engine.layers(into) if layer.kind == "experts"}
    for layer in engine.layers(model):
        if layer.rule and layer.kind == "experts":
            mixing = require(engine, Mixes)
            values = {
                name: np.stack([engine.to_numpy(engine.dequantize(q)) for q in experts])
                for name, experts in mixing.unpack_experts(layer.module).items()
            }
            found.update(mixing.stack_experts(floats[layer.path], values))
        elif layer.rule and not layer.tied:
            name = f"{layer.path}.weight" if layer.path else "weight"
            found[name] = engine.to_numpy(engine.dequantize(engine.unpack(layer.module)))
    engine.fill(into, found)
    return into


def newest_checkpoint(trained: Path) -> Path | None:
    """The checkpoint of the weights in the artifact `trained`, which `qkit train` left beside it: the last, or the best one.

    None: there is none, or its run had adapters.
    """
    folder = run_folder_of(trained)
    ends = [event for event in read_log(folder / LOG) if event["event"] == "end"]
    best = ends[-1].get("best_step") if ends else None
    found = max(folder.glob(PATTERN), default=None) if best is None else file_of(folder, best)
    found = found if found and found.exists() else None
    return None if found is None or _has_adapter(read_file(found)[1]) else found


def model_of_checkpoint(engine: Builds, file: Path, config: Mapping[str, Any] | None) -> Any:
    """The float model of `config` with the master weights in a checkpoint of `qkit train`, in their type.

    Raises:
        ArtifactError: the file is no such checkpoint, or one of another model.
    """
    tensors, metadata = read_file(file)
    if _has_adapter(metadata):
        raise ArtifactError(f"{file} holds adapters, and master weights that were not trained: leave it out")
    weights = {name.removeprefix(WEIGHTS): array for name, array in tensors.items() if name.startswith(WEIGHTS)}
    if not weights or config is None:
        raise ArtifactError(f"{file} holds no weights.* of a model with a config.json: give a checkpoint of qkit train")
    dtype = next(iter(weights.values())).dtype.name
    model = engine.build({**config, "dtype": dtype, "torch_dtype": dtype})
    names = engine.tensors(model).keys()  # static ranges are in the checkpoint, and in no float model
    engine.fill(model, {name: array for name, array in weights.items() if name in names})
    return model


def _has_adapter(metadata: Mapping[str, str]) -> bool:
    try:
        return bool(json.loads(metadata.get(KEY, "{}")).get("run", {}).get("adapter"))
    except (ValueError, AttributeError):
        return False


def recipe_of_layers(engine: Builds, model: Any) -> Recipe:
    """The recipe that the layers of a converted `model` are on, path by path. Its name is the grid that most of them have.

    Raises:
        StageError: no layer is quantized.
    """
    paths: dict[Rule, list[str]] = {}
    for layer in engine.layers(model):
        if layer.kind == "other":
            continue
        if layer.rule and layer.rule.weight:
            rule = replace(layer.rule, match=("*",), kind=layer.kind, indivisible="error")
            paths.setdefault(rule, []).append(layer.path)
    if not paths:
        raise StageError(
            "no layer of the trained model is quantized: name a directory that qkit train wrote, or a recipe"
        )
    most = max(paths, key=lambda rule: len(paths[rule]))
    name = " @ ".join(str(grid) for grid in (most.weight, most.activation) if grid)
    return Recipe(name, tuple(replace(rule, match=tuple(map(_literally, mine))) for rule, mine in paths.items()))


def _literally(path: str) -> str:
    """A shell pattern that matches `path` alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in path)
