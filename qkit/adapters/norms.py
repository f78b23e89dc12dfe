"""Norms that train beside adapters: which of them do, and how they come back from the files of an adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.adapters.adapter import Adapter
from qkit.engines.abilities import offers, require
from qkit.engines.norms import TrainsNorms
from qkit.engines.protocol import Modules
from qkit.errors import ArtifactError

Norms = Mapping[str, NDArray[Any]]  #: by the names of tensors


def train_norms(engine: Modules, model: Any, adapter: Adapter) -> None:
    """Has the norms around adapted layers train, as `adapter.norms` says: those of the modules that such a layer is part of.

    Norms in 16 bits do not: steps at the rates of adapters would be rounded away.

    Raises:
        BackendError: `adapter.norms` is `learned`, and the engine trains no norms.
    """
    if adapter.norms == "learned":
        require(engine, TrainsNorms)
    if adapter.norms == "stored" or not offers(engine, TrainsNorms):
        return
    layers = [layer for layer in engine.layers(model) if layer.adapter]
    inside = [layer.path for layer in layers if adapter.norms == "learned" or layer.stage == "converted"]
    tensors, named = engine.tensors(model), engine.norms(model)
    near = [name for name in named if any(path.startswith(_around(name)) for path in inside)]
    engine.train_norms(model, [name for name in near if engine.to_numpy(tensors[name]).dtype == np.float32])


def trained_norms(engine: Modules, model: Any) -> dict[str, NDArray[Any]]:
    """The norms of a model with adapters that train."""
    if not offers(engine, TrainsNorms):
        return {}
    names = [name for name, trains in engine.norms(model).items() if trains]
    tensors = engine.tensors(model) if names else {}
    return {name: engine.to_numpy(tensors[name]) for name in names}


def fill_norms(engine: Modules, model: Any, norms: Norms, folder: Path) -> None:
    """Gives the norms of `model` the values in `norms`, of the adapter in `folder`, and has them train. Rounded to its own types.

    Raises:
        ArtifactError: the model has no such norm, or one of another shape.
        BackendError: the engine trains no norms.
    """
    if not norms:
        return
    able = require(engine, TrainsNorms)
    known, arrays = able.norms(model), {name: engine.to_numpy(one) for name, one in engine.tensors(model).items()}
    for name, norm in norms.items():
        if name not in known or arrays[name].shape != norm.shape:
            here = f"the model's is {list(arrays[name].shape)}" if name in known else "the model has no such norm"
            raise ArtifactError(f"{folder} is for another base: its norm {name} is {list(norm.shape)}, and {here}")
        arrays[name] = norm.astype(arrays[name].dtype)
    able.fill(model, arrays)
    able.train_norms(model, list(norms))


def _around(name: str) -> str:
    """How the paths of everything in the module begin that has a norm: `a.b.` for the weight `a.b.norm.weight`."""
    return "".join(f"{part}." for part in name.split(".")[:-2])
