"""save and load: a model on any engine to a Hugging Face directory in compressed-tensors layout, and back on any engine."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qkit.artifact.aside import Aside
from qkit.artifact.tensors import SINGLE, read_folder, write_file
from qkit.backend import Backend, Layer
from qkit.errors import ArtifactError, BackendError, GridError, RecipeError, StageError
from qkit.interop import compressed_tensors
from qkit.pipeline import NOTE, surgeon
from qkit.qtensor import DTYPES, DType, QTensor
from qkit.recipe import Kind, Rule, rule_from_table, rule_table
from qkit.registry import backend as choose
from qkit.static import check_static, static_contents

KEY = "qkit"  #: the one metadata key of the weights file
NUMERICS = 1  #: version of the arithmetic that the codes follow
CONFIG = "config.json"
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template*",
)


def save(
    model: Any, folder: str | Path, *, source: str | Path | None = None, backend: str | Backend | None = None
) -> Path:
    """Writes `model`, converted or float, whole and portable; transformers, vLLM and qkit on any engine open it.

    All or nothing: the folder appears, or is replaced, when every byte is written.

    Args:
        folder: where to; made, or replaced if it is an earlier artifact.
        source: the Hugging Face directory the model came from: its config, tokenizer and generation files are copied. Left
            out, the configuration that the model carries; without one, only the weights are written.

    Raises:
        StageError: a layer is prepared but not converted.
        ArtifactError: a grid has no portable layout, or `folder` holds something else.
    """
    engine = surgeon(model, backend)
    folder, origin = Path(folder), None if source is None else Path(source)
    layers = list(engine.layers(model))
    for layer in layers:
        if layer.stage == "prepared":
            raise StageError(f"{layer.path} is prepared but not converted: call convert(model) before you save it")
    tensors = {name: engine.to_numpy(array) for name, array in engine.tensors(model).items()}
    saved = [
        (layer, engine.unpack(layer.module).map(engine.to_numpy))
        for layer in layers
        if layer.stage == "converted" and not layer.tied  # what is tied is stored once, under the first path
    ]
    for layer, q in saved:
        for name, array in compressed_tensors.to_tensors(q).items():
            tensors[_join(layer.path, name)] = array
    entries = _group(saved)
    config = engine.config(model) if origin is None else _read_config(origin)
    if origin is not None and (config is None or origin.resolve() == folder.resolve()):
        why = "has no config.json" if config is None else "is where the artifact would go"
        raise ArtifactError(f"the source {origin} {why}: name the model's own Hugging Face directory")
    if config is not None:
        config.pop("quantization_config", None)
        if entries:
            left_alone = [
                layer.path for layer in layers if layer.kind == "linear" and (layer.stage == "float" or layer.tied)
            ]
            groups = [(entry.rule, entry.paths) for entry in entries]
            config["quantization_config"] = compressed_tensors.quantization_config(groups, left_alone=left_alone)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else ()):
        _check_ours(folder)
    with Aside(folder, ours=(SINGLE, CONFIG, *COMPANIONS)) as aside:
        write_file(aside / SINGLE, tensors, {KEY: _describe(entries)})
        if config is not None:
            (aside / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for pattern in COMPANIONS:
            for file in sorted(origin.glob(pattern)) if origin else ():
                (aside / file.name).write_bytes(file.read_bytes())
    return folder


def load(folder: str | Path, *, backend: str | Backend | None = None, into: Any = None) -> Any:
    """The model in `folder`, float or converted, on an engine.

    Args:
        backend: the engine; left out, the one of `into`, or the first that is ready.
        into: a model of yours to fill, by the paths of its layers; left out, one is built from `config.json`.

    Raises:
        ArtifactError: a file is missing or unsound, or does not fit the model.
        BackendError: the engine is missing, or cannot build such a model.
    """
    folder = Path(folder)
    engine = choose(backend) if into is None else surgeon(into, backend)
    arrays, metadata = read_folder(folder)
    config = _read_config(folder)
    entries = _entries(folder, metadata, config)
    model = _build(engine, folder, config) if into is None else into
    layers = {layer.path: layer for layer in engine.layers(model)}
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
            rule = Rule(("*",), kind=_kind(layer), weight=taken[layer.tied].rule.weight)
            packed[path] = engine.pack(layer.module, taken[layer.tied].q, rule, owner=packed[layer.tied])
        elif path in taken:
            packed[path] = engine.pack(layer.module, taken[path].q, taken[path].rule, static=taken[path].static)
    return engine.replace(model, packed)


def _build(engine: Backend, folder: Path, config: Mapping[str, Any] | None) -> Any:
    if config is None:
        raise ArtifactError(f"{folder} has no {CONFIG}: pass into= a model to fill")
    if not hasattr(engine, "build"):
        raise BackendError(f"backend {engine.name!r} works on arrays only: it has no models to load into")
    return engine.build(_without(config, "quantization_config"))


@dataclass(frozen=True, slots=True)
class _Entry:
    """One rule of an artifact, the type of the weights it was applied to, and the full paths of their layers."""

    rule: Rule
    dtype: DType
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Taken:
    """What an artifact has for one layer."""

    q: QTensor[Any]
    rule: Rule
    static: dict[str, NDArray[Any]]


def _take(
    folder: Path, arrays: dict[str, NDArray[Any]], path: str, layers: Mapping[str, Layer], entry: _Entry
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


def _group(saved: list[tuple[Layer, QTensor[Any]]]) -> list[_Entry]:
    paths: dict[tuple[Rule, DType], list[str]] = {}
    for layer, q in saved:
        assert layer.rule is not None
        rule = replace(layer.rule, match=("*",), kind=_kind(layer), indivisible="error")
        paths.setdefault((rule, q.dtype), []).append(layer.path)
    return [
        _Entry(rule, dtype, tuple(sorted(mine)))
        for (rule, dtype), mine in sorted(paths.items(), key=lambda item: min(item[1]))
    ]


def _describe(entries: list[_Entry]) -> str:
    rules = [
        {**_without(rule_table(entry.rule), "match"), "layers": list(entry.paths), "dtype": entry.dtype}
        for entry in entries
    ]
    return json.dumps({"numerics": NUMERICS, "rules": rules}, sort_keys=True)


def _entries(folder: Path, metadata: Mapping[str, str], config: Mapping[str, Any] | None) -> list[_Entry]:
    entries = _described(folder, metadata[KEY]) if KEY in metadata else []
    foreign = config.get("quantization_config") if config else None
    if foreign and not entries:
        method = foreign.get("quant_method", "an unknown tool")
        raise ArtifactError(
            f"{folder} is quantized by {method}, not by qkit: it does not say which grid its codes are on"
        )
    return entries


def _described(folder: Path, text: str) -> list[_Entry]:
    try:
        described = json.loads(text)
        if described["numerics"] != NUMERICS:
            raise ArtifactError(f"{folder} follows numerics {described['numerics']}; this qkit reads {NUMERICS}")
        return [_entry(dict(table)) for table in described["rules"]]
    except ArtifactError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder}: the {KEY} metadata is not readable ({error})") from None


def _entry(table: dict[str, Any]) -> _Entry:
    paths, dtype = tuple(map(str, table.pop("layers"))), table.pop("dtype")
    if dtype not in DTYPES:
        raise RecipeError(f"unknown dtype {dtype!r}")
    return _Entry(rule_from_table({**table, "match": ["*"]}), dtype, paths)


def _kind(layer: Layer) -> Kind:
    return "embedding" if layer.kind == "embedding" else "linear"


def _check_ours(folder: Path) -> None:
    """Refuses to replace what qkit did not write."""
    if KEY not in read_folder(folder)[1]:
        raise ArtifactError(f"{folder} holds a model that qkit did not write: choose another folder")


def _without(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}


def _read_config(folder: Path) -> dict[str, Any] | None:
    file = folder / CONFIG
    if not file.exists():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{file}: not a JSON object ({error})") from None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
