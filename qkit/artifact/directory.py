"""save and load: a model on any engine to a Hugging Face directory in compressed-tensors layout, and back on any engine."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from numpy.typing import NDArray

from qkit.artifact.config import check_config
from qkit.artifact.metadata import KEY, Entry, describe, entries_of, group, kind_of
from qkit.engines.abilities import require, want_honored
from qkit.engines.layer import Layer, want_merged, want_whole
from qkit.engines.protocol import Arrays, Builds, Modules
from qkit.engines.registry import backend as choose
from qkit.errors import ArtifactError, GridError, StageError
from qkit.formats import compressed_tensors
from qkit.formats.settings import WAY_OUT
from qkit.pipeline import NOTE, Model, surgeon
from qkit.qtensor import DType, QTensor
from qkit.reference.ranges import check_static, static_contents
from qkit.rules import Rule
from qkit.storage.arrays import array_stream, in_type, with_type
from qkit.storage.destination import check_directory, destination
from qkit.storage.layout import SHARD_BYTES
from qkit.storage.read import inside, is_pickle, read_folder, read_json
from qkit.storage.seal import check_seal
from qkit.storage.write import write_directory

CONFIG = "config.json"
MODELOPT = "hf_quant_config.json"  #: where NVIDIA ModelOpt says what config.json may leave out
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template*",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
)
CODE = (".py", ".so", ".sh", ".ipynb")


def save(
    model: Any,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    backend: str | Arrays | None = None,
    dtype: DType | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes `model`, converted or float, whole and portable; transformers, vLLM and qkit on any engine open it.

    All or nothing: the folder appears, or is replaced, when every byte is written.

    Args:
        folder: where to; made, or replaced if it is an earlier artifact.
        source: the Hugging Face directory the model came from: its config, tokenizer and generation files are copied. Left
            out, the configuration that the model carries; without one, only the weights are written.
        dtype: what float tensors are stored in, and values of codes given back in, where it is not the model's own type:
            masters of float32 become a bfloat16 model again. Codes and scales are the same; left out, nothing is cast.
        shard_bytes: most bytes of tensors in one file.

    Raises:
        StageError: a layer is prepared but not converted, or has an adapter, or is sharded.
        ArtifactError: a grid has no portable layout, or `folder` holds something else; see `check_directory`.
        PlanError: the disk is read-only.
        LockedError: another process writes `folder`.
    """
    engine = surgeon(model, backend)
    folder, origin = Path(folder), None if source is None else Path(source)
    config = engine.config(model) if origin is None else read_config(origin)
    if origin is not None and (config is None or origin.resolve() == destination(folder).path):
        why = "has no config.json" if config is None else "is where the artifact would go"
        raise ArtifactError(f"the source {origin} {why}: name the model's own Hugging Face directory")
    check_directory(folder)
    layers = list(engine.layers(model))
    want_whole(layers, "save")
    want_merged(layers, "save")
    for layer in layers:
        if layer.stage == "prepared":
            raise StageError(f"{layer.path} is prepared but not converted: call convert(model) before you save it")
    tensors = {name: engine.to_numpy(array) for name, array in engine.tensors(model).items()}
    static = {_join(layer.path, name) for layer in layers if layer.rule for name in static_contents(layer.rule)}
    tensors = in_type(tensors, dtype, but=static)
    saved = [
        (layer, with_type(engine.unpack(layer.module).map(engine.to_numpy), dtype))
        for layer in layers
        if layer.stage == "converted" and not layer.tied  # what is tied is stored once, under the first path
    ]
    for layer, q in saved:
        for name, array in compressed_tensors.to_tensors(q).items():
            tensors[_join(layer.path, name)] = array
    entries = group([(layer, q.dtype) for layer, q in saved])
    left_alone = [layer.path for layer in layers if layer.kind == "linear" and (layer.stage == "float" or layer.tied)]
    write_directory(
        folder,
        [array_stream(name, array) for name, array in tensors.items()],
        metadata={KEY: describe(entries)},
        files=companions(origin, config=quantized_config(config, entries, left_alone=left_alone)),
        shard_bytes=shard_bytes,
    )
    return folder


@overload
def load(folder: str | Path, *, backend: str | Arrays | None = None, into: Model) -> Model: ...
@overload
def load(folder: str | Path, *, backend: str | Arrays | None = None, into: None = None) -> Any: ...
def load(folder: str | Path, *, backend: str | Arrays | None = None, into: Any = None) -> Any:
    """The model in `folder`, float or converted, on an engine.

    Args:
        backend: the engine; left out, the one of `into`, or the first that is ready.
        into: a model of yours to fill, by the paths of its layers; left out, one is built from `config.json`.

    Raises:
        ArtifactError: a file is missing or unsound, is not what `qkit.json` says was written, or does not fit the model.
        BackendError: the engine is missing, cannot build such a model, or does not honour a key of its rules.
    """
    folder = Path(folder)
    engine = require(choose(backend), Modules) if into is None else surgeon(into, backend)
    stored, metadata = read_folder(folder)
    check_seal(folder, stored, digests=True)
    arrays = {name: tensor.mapped() for name, tensor in stored.items()}
    config = read_config(folder)
    entries = entries_of(folder, metadata, config)
    rules = [replace(entry.rule, ste="identity", scales="rule") for entry in entries]  # the two keys of training
    want_honored(engine, rules, f"load {folder}")
    model = _build(engine, folder, config) if into is None else into
    layers = {layer.path: layer for layer in engine.layers(model)}
    for layer in layers.values():
        if layer.stage != "float":
            raise ArtifactError(f"{folder}: {layer.path} is {layer.stage} already: load into the float model")
    taken = {path: _take(folder, arrays, path, layers, entry) for entry in entries for path in entry.paths}
    try:
        engine.fill(model, arrays, without={_join(path, "weight") for path in taken})
    except ArtifactError as error:
        raise ArtifactError(f"{folder}: {error}") from None
    packed: dict[str, Any] = {}
    for path, layer in layers.items():
        if layer.kind != "other":
            setattr(layer.module, NOTE, "float in the artifact")
        if layer.tied and layer.tied in taken:
            rule = Rule(("*",), kind=kind_of(layer), weight=taken[layer.tied].rule.weight)
            packed[path] = engine.pack(layer.module, taken[layer.tied].q, rule, owner=packed[layer.tied])
        elif path in taken:
            packed[path] = engine.pack(layer.module, taken[path].q, taken[path].rule, static=taken[path].static)
    return engine.replace(model, packed)


def _build(engine: Arrays, folder: Path, config: Mapping[str, Any] | None) -> Any:
    if config is None:
        raise ArtifactError(f"{folder} has no {CONFIG}: pass into= a model to fill")
    return require(engine, Builds).build(_without(config, "quantization_config"))


@dataclass(frozen=True, slots=True)
class _Taken:
    """What an artifact has for one layer."""

    q: QTensor[Any]
    rule: Rule
    static: dict[str, NDArray[Any]]


def _take(
    folder: Path, arrays: dict[str, NDArray[Any]], path: str, layers: Mapping[str, Layer], entry: Entry
) -> _Taken:
    """The codes and static scales of the layer at `path`, which are taken out of `arrays`."""
    layer, grid = layers.get(path), entry.rule.weight
    if layer is None or grid is None:
        raise ArtifactError(f"{folder}: the model has no layer {path!r} to hold its codes")
    if layer.stage == "converted" or layer.obstacle or layer.tied:
        raise ArtifactError(f"{folder}: {path} cannot take its codes: {_why_not(layer)}")
    try:
        names = compressed_tensors.contents(grid, dtype=entry.dtype, shape=layer.shape)
        found = {name: arrays.pop(_join(path, name)) for name in names if _join(path, name) in arrays}
        q = compressed_tensors.from_tensors(found, grid=grid, dtype=entry.dtype, shape=layer.shape)
        static = {name: arrays.pop(_join(path, name), None) for name in static_contents(entry.rule)}
        return _Taken(q, entry.rule, check_static(static, entry.rule))
    except (ArtifactError, GridError) as error:
        raise ArtifactError(f"{folder}: {path}: {error}") from None


def _why_not(layer: Layer) -> str:
    if layer.stage == "converted":
        return "it is converted already"
    return layer.obstacle or f"its weight is that of {layer.tied}"


def _without(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}


def quantized_config(
    config: Mapping[str, Any] | None, entries: list[Entry], *, left_alone: list[str]
) -> dict[str, Any] | None:
    """`config` of a Hugging Face model with the `quantization_config` of `entries`; None where there is none."""
    if config is None:
        return None
    config = _without(config, "quantization_config")
    if entries:
        groups = [(entry.rule, entry.paths) for entry in entries]
        config["quantization_config"] = compressed_tensors.quantization_config(groups, left_alone=left_alone)
    return config


def companions(origin: Path | None, *, config: Mapping[str, Any] | None) -> dict[str, bytes | Path]:
    """What goes beside the weights: the configuration, and the tokenizer and generation files of `origin`; no code, no pickle.

    Raises:
        ArtifactError: one of them is a link out of the folder.
    """
    files: dict[str, bytes | Path] = {}
    if config is not None:
        files[CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    for pattern in COMPANIONS:
        for file in origin.glob(pattern) if origin else ():
            if file.is_file() and not is_pickle(file.name) and not file.name.endswith(CODE):
                files[file.name] = inside(file.parent, file.name)
    return files


def read_config(folder: Path) -> dict[str, Any] | None:
    """The `config.json` of `folder`, if there is one.

    Raises:
        ArtifactError: it is not a JSON object, or a link out of the folder; or another file says how the model is quantized; or
            see `check_config`.
    """
    config = read_json(inside(folder, CONFIG))
    if config is not None:
        check_config(config, folder / CONFIG)
    if (folder / MODELOPT).exists() and not (config or {}).get("quantization_config"):
        raise ArtifactError(f"{folder / MODELOPT} says how the model is quantized, which qkit does not read: {WAY_OUT}")
    return config


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
