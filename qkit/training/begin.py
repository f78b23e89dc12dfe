"""`take_codes`: a prepared model begins training with the very codes and scales of a quantized directory, or is refused."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.metadata import fit_of
from qkit.artifact.snapshot import Snapshot
from qkit.conversion import prepared_codes
from qkit.engines.abilities import require
from qkit.engines.layer import Layer
from qkit.engines.mixtures import Mixes
from qkit.engines.protocol import Builds
from qkit.errors import RunError
from qkit.exchange.import_model import read_model
from qkit.exchange.load_any import load_any
from qkit.experts import expert_of
from qkit.qtensor import QTensor
from qkit.reference.learned import FIRST, parameters_of
from qkit.reference.rounding import scale_values
from qkit.storage.other_models import gguf
from qkit.storage.read import MissingError, read_folder
from qkit.training.run import Run

Codes = Mapping[str, QTensor[NDArray[Any]]]  #: by path of a layer, or of one projection of one expert


def source_of(run: Run) -> Snapshot:
    """The model that a run trains: that of `run.init`, checked against the float one, or `run.model` where there is none.

    Raises:
        MissingError: `run.model` is a file: a run goes on from its directory later.
        RunError: the two are not of one model, or `run.model` is quantized, too.
        ArtifactError: as `read_model`.
    """
    if run.model.is_file():
        raise MissingError(gguf(run.model))
    source = read_model(run.model)
    if run.init is None:
        return source
    if run.init.resolve() == run.model.resolve():
        return source
    if source.weights:
        raise RunError(
            f"init: {run.model} is quantized, too: name the float model that {run.init} was made of, or leave one out"
        )
    init = read_model(run.init)
    both = source.tensors.keys() & init.tensors.keys()
    corrected = {f"{path}.weight" for path in (fit_of(read_folder(run.init)[1]) or {}).get("heads", ())}
    for name in sorted(both - corrected):
        mine, other = source.tensors[name], init.tensors[name]
        if mine.shape != other.shape or not np.array_equal(mine, other, equal_nan=True):
            raise RunError(
                f"init: {run.init} is of another model than {run.model}, since {name} differs: name its float model"
            )
    if not both:
        raise RunError(f"init: {run.init} has no tensor in common with {run.model}: name its float model")
    return init


def take_codes(engine: Builds, model: Any, source: Snapshot) -> None:
    """Gives the learned scales of a prepared model, whose weights are the values of the codes in `source`, the stored scales.

    Raises:
        RunError: a layer is prepared and has no codes, or those of another grid, or the other way round; or its scales follow
            from a rule that finds other ones.
    """
    codes, folder = _codes_of(engine, source), source.folder
    layers = [layer for layer in engine.layers(model) if layer.stage == "prepared" and not layer.tied]
    wanted = {path for layer in layers for path in _paths(layer, codes)}
    for path in sorted(codes.keys() - wanted):
        raise RunError(
            f"init: {folder} has codes of {path}, which the recipe leaves in float: name the recipe of {folder}"
        )
    tensors = engine.tensors(model)
    learned = {name: array for layer in layers for name, array in _learned(layer, codes, folder, tensors)}
    if learned:
        engine.fill(model, {**{name: engine.to_numpy(one) for name, one in tensors.items()}, **learned})
    for path, q in prepared_codes(engine, model, [(layer, layer.rule) for layer in layers if layer.rule]):
        want = codes[path]
        if not (
            _same(q.codes, want.codes) and _same(scale_values(q), scale_values(want)) and _same(q.zeros, want.zeros)
        ):
            way_out = (
                f"which cannot learn on {want.grid}: leave init out, so that training begins with the values alone"
                if want.grid.scale == "nvfp4"
                else 'so take a recipe with scales = "learned", such as int4-g64-learned, or leave init out'
            )
            raise RunError(f"init: the rule of {path} finds other scales than those in {folder}, {way_out}")


def _codes_of(engine: Builds, source: Snapshot) -> dict[str, QTensor[NDArray[Any]]]:
    """The quantized weights in `source`, by path of a layer of a model, or of one projection of one expert.

    Raises:
        RunError: there are none.
        ArtifactError: as `load_any`.
    """
    if not source.weights:
        raise RunError(
            f"init: {source.folder} is a float model, whose codes nobody has chosen: name a quantized directory"
        )
    model, found = load_any(source, engine), dict[str, QTensor[Any]]()
    for layer in engine.layers(model):
        if layer.stage == "converted" and layer.kind == "experts":
            for projection, several in require(engine, Mixes).unpack_experts(layer.module).items():
                found |= {f"{layer.name}.{number}.{projection}": q for number, q in enumerate(several)}
        elif layer.stage == "converted" and not layer.tied:
            found[layer.name] = engine.unpack(layer.module)
    return {path: replace(q.map(engine.to_numpy), dtype="float32") for path, q in found.items()}


def _paths(layer: Layer, codes: Codes) -> Iterator[str]:
    """The paths of the codes of a layer: its own, or those of every projection of its experts."""
    if layer.kind != "experts":
        yield layer.name
        return
    for path in codes:
        if (found := expert_of(path)) and found[0] == layer.name:
            yield path


def _learned(
    layer: Layer, codes: Codes, folder: Path, tensors: Mapping[str, Any]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """The learned parameters of a layer that give the scales of its codes, by their names in the model.

    Raises:
        RunError: there are no codes of the layer, or those of another grid.
    """
    assert layer.rule is not None
    paths = list(_paths(layer, codes))
    for path in paths or [layer.name]:
        if path not in codes:
            raise RunError(
                f"init: {folder} has no codes of {path}, which the recipe quantizes: name the recipe of {folder}, or ignore it"
            )
        if codes[path].grid != layer.rule.weight:
            raise RunError(
                f"init: {path} is on {codes[path].grid} in {folder}, and the recipe wants {layer.rule.weight}: name a recipe of "
                "the same grid"
            )
    if layer.rule.scales == "rule":
        return
    if layer.kind != "experts":
        for own, array in parameters_of(codes[layer.name]).items():
            for name in (own, FIRST + own) if layer.rule.scales == "alone" else (own,):
                yield f"{layer.path}.{name}" if layer.path else name, array
        return
    block = "".join(f"{part}." for part in layer.path.split(".")[:-2])
    for projection in layer.projections:
        mine = sorted((found[1], path) for path in paths if (found := expert_of(path)) and found[2] == projection)
        each = [parameters_of(codes[path]) for _, path in mine]
        if layer.rule.scales == "alone":
            each = [{**one, **{FIRST + own: array for own, array in one.items()}} for one in each]
        for own in each[0]:
            array, ends = np.stack([one[own] for one in each]), (f".{projection}_{own}", f".{projection}.{own}")
            yield next(n for n, x in tensors.items() if _is_stack(n, block, ends) and x.shape == array.shape), array


def _is_stack(name: str, block: str, ends: tuple[str, str]) -> bool:
    """Whether a tensor is what all experts of a block learn beside a projection: each engine has a name for it."""
    return name.startswith(block) and name.endswith(ends)


def _same(one: NDArray[Any] | None, other: NDArray[Any] | None) -> bool:
    return one is other if one is None or other is None else np.array_equal(one, other)
