"""save and load: a model on any engine to a Hugging Face directory in compressed-tensors layout, and back on any engine."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qkit.artifact.tensors import SINGLE, read_folder, write_file
from qkit.backend import Backend, Layer
from qkit.errors import ArtifactError, GridError, RecipeError, StageError
from qkit.interop import compressed_tensors
from qkit.qtensor import DTYPES, DType, QTensor
from qkit.recipe import Rule, rule_from_table, rule_table
from qkit.registry import backend as choose
from qkit.registry import backend_of

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
    engine = backend_of(model) if backend is None else choose(backend)
    layers = list(engine.layers(model))
    for layer in layers:
        if layer.stage == "prepared":
            raise StageError(f"{layer.path} is prepared but not converted: call convert(model) before you save it")
    tensors = {name: engine.to_numpy(array) for name, array in engine.tensors(model).items()}
    saved = [
        (layer, engine.unpack(layer.module).map(engine.to_numpy)) for layer in layers if layer.stage == "converted"
    ]
    for layer, q in saved:
        for name, array in compressed_tensors.to_tensors(q).items():
            tensors[_join(layer.path, name)] = array
    entries = _group(saved)
    metadata = {KEY: _describe(entries)} if entries else {"format": "pt"}
    config = _config(engine, model, Path(source) if source else None)
    if config is not None and entries:
        left_alone = [layer.path for layer in layers if layer.stage == "float" and layer.kind == "linear"]
        rules = [entry.rule for entry in entries]
        config["quantization_config"] = compressed_tensors.quantization_config(rules, left_alone=left_alone)

    folder = Path(folder)
    with _Aside(folder) as aside:
        write_file(aside / SINGLE, tensors, metadata)
        if config is not None:
            (aside / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if source:
            for pattern in COMPANIONS:
                for file in sorted(Path(source).glob(pattern)):
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
    engine = backend_of(into) if backend is None and into is not None else choose(backend)
    arrays, metadata = read_folder(folder)
    config = _read_config(folder)
    entries = _entries(folder, metadata, config)
    model = into
    if model is None:
        if config is None:
            raise ArtifactError(f"{folder} has no {CONFIG}: pass into= a model to fill")
        model = engine.build({key: value for key, value in config.items() if key != "quantization_config"}, folder)
    layers = {layer.path: layer for layer in engine.layers(model)}
    packed = {}
    for entry in entries:
        for path in entry.rule.match:
            if path not in layers:
                raise ArtifactError(f"{folder}: the model has no layer {path!r} to hold its codes")
            q = _take(folder, arrays, layers[path], entry)
            packed[path] = engine.pack(layers[path].module, q, replace(entry.rule, match=(path,)))
    model = engine.replace(model, packed)
    engine.fill(model, arrays)
    return model


@dataclass(frozen=True, slots=True)
class _Entry:
    """One rule of an artifact; its `match` are the full paths of the layers it made."""

    rule: Rule
    dtype: DType


def _take(folder: Path, arrays: dict[str, NDArray[Any]], layer: Layer, entry: _Entry) -> QTensor[Any]:
    grid = entry.rule.weight
    assert grid is not None
    mine = {name: _join(layer.path, name) for name in compressed_tensors.names(grid)}
    found = {name: arrays.pop(full) for name, full in mine.items() if full in arrays}
    try:
        return compressed_tensors.from_tensors(found, grid=grid, dtype=entry.dtype, shape=layer.shape)
    except (ArtifactError, GridError) as error:
        raise ArtifactError(f"{folder}: {layer.path}: {error}") from None


def _group(saved: list[tuple[Layer, QTensor[Any]]]) -> list[_Entry]:
    paths: dict[tuple[Any, ...], list[str]] = {}
    for layer, q in saved:
        assert layer.rule is not None
        paths.setdefault((layer.kind, layer.rule.weight, layer.rule.activation, q.dtype), []).append(layer.path)
    return [
        _Entry(Rule(tuple(sorted(match)), kind=kind, weight=weight, activation=activation), dtype)
        for (kind, weight, activation, dtype), match in sorted(paths.items(), key=lambda item: min(item[1]))
    ]


def _describe(entries: list[_Entry]) -> str:
    rules = [{**rule_table(entry.rule), "dtype": entry.dtype} for entry in entries]
    return json.dumps({"numerics": NUMERICS, "rules": rules}, sort_keys=True)


def _entries(folder: Path, metadata: Mapping[str, str], config: Mapping[str, Any] | None) -> list[_Entry]:
    if KEY not in metadata:
        if config is not None and "quantization_config" in config:
            method = config["quantization_config"].get("quant_method", "an unknown tool")
            raise ArtifactError(
                f"{folder} is quantized by {method}, not by qkit: it does not say which grid its codes are on"
            )
        return []
    try:
        described = json.loads(metadata[KEY])
        if described["numerics"] != NUMERICS:
            raise ArtifactError(f"{folder} follows numerics {described['numerics']}; this qkit reads {NUMERICS}")
        tables = [dict(table) for table in described["rules"]]
        entries = [_Entry(dtype=_dtype(table.pop("dtype")), rule=rule_from_table(table)) for table in tables]
    except (ValueError, KeyError, TypeError, RecipeError) as error:
        raise ArtifactError(f"{folder}: the {KEY} metadata is not readable ({error})") from None
    return entries


def _dtype(name: str) -> DType:
    if name not in DTYPES:
        raise ArtifactError(f"unknown dtype {name!r}")
    return name


def _without(table: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name != key}


def _config(engine: Backend, model: Any, source: Path | None) -> dict[str, Any] | None:
    if source is None:
        config = engine.config(model)
    else:
        config = _read_config(source)
        if config is None:
            raise ArtifactError(f"{source} has no {CONFIG}: it is not a Hugging Face directory")
    return None if config is None else _without(config, "quantization_config")


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


class _Aside:
    """A folder beside the wanted one, which takes its place when the block ends well and vanishes when it does not."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / SINGLE).exists())):
            raise ArtifactError(f"{folder} exists and is no artifact: choose another folder, or remove it")
        self.folder = folder
        self.aside = folder.with_name(f".{folder.name}.writing-{os.getpid()}")

    def __enter__(self) -> Path:
        self.aside.mkdir(parents=True)
        return self.aside

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        from shutil import rmtree  # here, so that `import qkit` stays cheap

        if kind is not None:
            rmtree(self.aside, ignore_errors=True)
            return
        old = self.folder.with_name(f".{self.folder.name}.old-{os.getpid()}")
        if self.folder.exists():
            self.folder.rename(old)
        self.aside.rename(self.folder)
        rmtree(old, ignore_errors=True)
