"""`save`: a model on any engine to a Hugging Face directory in compressed-tensors layout."""

import json
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qkit.artifact.companions import companions
from qkit.artifact.config import quantized_config, read_config
from qkit.artifact.expert_files import file_stack
from qkit.artifact.metadata import KEY, StoredRule, describe, group_paths, stored_rule
from qkit.artifact.servers import VLLM, sentences
from qkit.artifact.transformers_experts import has_single
from qkit.engines.abilities import offers, require
from qkit.engines.elsewhere import Remembers
from qkit.engines.layer import FIT, Layer, want_bare, want_merged, want_none_lost, want_whole
from qkit.engines.mixtures import Mixes
from qkit.engines.protocol import Arrays, Modules
from qkit.errors import ArtifactError, ServerWarning, StageError
from qkit.expert_inputs import static_of
from qkit.experts import file_name, paths_of
from qkit.formats import compressed_tensors
from qkit.formats.packed import join
from qkit.pipeline import surgeon
from qkit.qtensor import DTYPES, DType, QTensor
from qkit.reference.ranges import static_contents
from qkit.rules import Rule
from qkit.storage.arrays import array_stream
from qkit.storage.destination import check_directory, destination
from qkit.storage.layout import SHARD_BYTES
from qkit.storage.write import write_directory


def save(
    model: Any,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    backend: str | Arrays | None = None,
    dtype: DType | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes `model`, converted or float, as a directory that transformers, vLLM and qkit on any engine open.

    The folder appears, or replaces an earlier one, in one step after every byte is written. Warns where vLLM would not open it,
    or compute otherwise.

    Args:
        folder: the directory to write. An earlier artifact there is replaced.
        source: the Hugging Face directory of the original model, whose config, tokenizer and generation files are copied.
            By default, the model's own configuration is written, and the other files are those of the directory that the
            model remembers: of `from_pretrained`, or of `qkit.load`. A module of your own gives the weights alone.
        dtype: type of the stored float tensors and of dequantized values. float32 master weights become a bfloat16 model this
            way. Codes and scales do not depend on it. By default, every tensor keeps its type.
        shard_bytes: most bytes of tensors in one file.

    Returns:
        The folder.

    Raises:
        StageError: a layer is prepared but not converted, or has an adapter, or is sharded.
        ArtifactError: a grid has no portable layout, or `folder` holds other files; see `check_directory`. Or the model is one of
            mlx-lm's that does not say where it came from.
        PlanError: the disk is read-only.
        LockedError: another process writes `folder`.
    """
    engine = surgeon(model, backend)
    folder, origin = Path(folder), origin_of(engine, model, source)
    config = engine.config(model) if source is None else read_config(Path(source))
    if origin is not None and origin.resolve() == destination(folder).path:
        raise ArtifactError(
            f"the source {origin} is where the artifact would go: name the model's own Hugging Face directory"
        )
    if source is not None and config is None:
        raise ArtifactError(f"the source {origin} has no config.json: name the model's own Hugging Face directory")
    check_directory(folder)
    found = replace(contents(engine, model, config, dtype=dtype), fit=_fit_of_layers(engine.layers(model)))
    for text in found.served:
        warnings.warn(f"{VLLM}: {text}", ServerWarning, stacklevel=2)
    write(folder, found, config, origin, shard_bytes=shard_bytes)
    return folder


@dataclass(frozen=True, slots=True)
class Contents:
    """The contents of an artifact.

    Attributes:
        tensors: the tensors by name.
        rules: the rules of its layers.
        left_alone: the paths of linear layers that stay float.
        served: how vLLM differs; see `servers.sentences`.
        fit: how the codes were chosen; None: by the rule of their grid.
    """

    tensors: dict[str, NDArray[Any]]
    rules: list[StoredRule]
    left_alone: list[str]
    served: tuple[str, ...]
    fit: Mapping[str, Any] | None = None


def write(
    folder: Path, found: Contents, config: Mapping[str, Any] | None, origin: Path | None, *, shard_bytes: int
) -> None:
    """Writes an artifact of these contents; see `save`."""
    single = has_single(found.tensors)
    config = quantized_config(config, found.rules, left_alone=found.left_alone, single_experts=single)
    write_directory(
        folder,
        [array_stream(name, array) for name, array in found.tensors.items()],
        metadata={KEY: describe(found.rules, fit=found.fit)},
        files=companions(origin, config=config),
        shard_bytes=shard_bytes,
    )


def _fit_of_layers(layers: Iterable[Layer]) -> dict[str, Any] | None:
    """How the codes of converted layers were chosen; None where they were not fitted, or not all alike."""
    known = {getattr(layer.module, FIT, "") for layer in layers if layer.rule and layer.stage == "converted"}
    return dict(json.loads(known.pop())) if len(known) == 1 and all(known) else None


def contents(engine: Modules, model: Any, config: Mapping[str, Any] | None, *, dtype: DType | None = None) -> Contents:
    """The contents of an artifact of `model` with this configuration; see `save`.

    Raises:
        StageError, ArtifactError: see `save`.
    """
    layers = list(engine.layers(model))
    want_whole(layers, "save")
    want_merged(layers, "save")
    want_bare(layers, "save")
    want_none_lost(layers, "save")
    for layer in layers:
        if layer.stage == "prepared":
            raise StageError(f"{layer.path} is prepared but not converted: call convert(model) before you save it")
    tensors = {name: engine.to_numpy(array) for name, array in engine.tensors(model).items()}
    static = {join(layer.path, name) for layer in layers if layer.rule for name in static_contents(layer.rule)}
    if dtype is not None:
        tensors = _cast(tensors, dtype, but=static)
    tensors = _with_files_experts(engine, layers, tensors, config)
    tensors = {file_name(name, config): array for name, array in tensors.items()}
    converted = [
        (path, stored_rule(layer.rule), q if dtype is None else replace(q, dtype=dtype))
        for layer in layers
        if layer.rule
        and layer.stage == "converted"
        and not layer.tied  # a tied weight is stored once, under its first path
        for path, q in _weights(engine, layer, config)
    ]
    for layer in layers:
        if layer.rule and layer.kind == "experts":
            found = require(engine, Mixes).expert_scales(layer.module)
            scales = {name: engine.to_numpy(array) for name, array in found.items()}
            for (number, projection), path in paths_of(layer.path, layer.projections, config).items():
                mine = static_of(scales, number, projection, layer.rule)
                tensors |= {join(path, name): array for name, array in mine.items()}
    return assemble(layers, tensors, converted, config)


def assemble(
    layers: Sequence[Layer],
    tensors: dict[str, NDArray[Any]],
    converted: Sequence[tuple[str, Rule, QTensor[NDArray[Any]]]],
    config: Mapping[str, Any] | None,
    *,
    lay: Callable[[str, NDArray[Any]], NDArray[Any]] = lambda name, array: array,
) -> Contents:
    """The contents of an artifact of converted layers.

    Args:
        tensors: the other tensors, by their names in files.
        converted: path, rule and weight of each.
        lay: where each tensor of a weight lies until it is written, by its name in files.
    """
    for path, rule, q in converted:
        for name, array in compressed_tensors.to_tensors(q, compressed_tensors.form_of(rule)).items():
            tensors[join(path, name)] = lay(join(path, name), array)
        tensors |= {join(path, name): array for name, array in compressed_tensors.server_tensors(rule).items()}
    rules = group_paths((rule, q.dtype, path) for path, rule, q in converted)
    left_alone = [layer.path for layer in layers if layer.kind == "linear" and (layer.stage == "float" or layer.tied)]
    left_alone += [  # such as a router's: for a reader it may be a linear layer
        file_name(layer.path, config).removesuffix(".weight")
        for layer in layers
        if layer.kind == "other" and len(layer.shape) == 2 and layer.path.endswith(".weight")
    ]
    tied = any(layer.tied and layer.kind == "linear" for layer in layers) or bool(
        (config or {}).get("tie_word_embeddings")
    )
    shared = {path: float(q.tensor_scale) for path, _, q in converted if q.tensor_scale is not None}
    return Contents(tensors, rules, left_alone, tuple(sentences(rules, tied=tied, tensor_scales=shared)))


def origin_of(engine: Modules, model: Any, source: str | Path | None) -> Path | None:
    """The directory that the model comes from: `source`, or the one that the model remembers if it is still there."""
    if source is not None:
        return Path(source)
    if not offers(engine, Remembers):
        return None
    named = engine.origin(model)
    if named is not None and Path(named).is_dir():
        return Path(named)
    if engine.config(model) is None and engine.knows(model):
        raise ArtifactError(
            f"{type(model).__name__} is a language model that does not say where it came from, so that its config.json would be "
            "missing: give source=, its Hugging Face directory"
        )
    return None


def _with_files_experts(
    engine: Modules, layers: Iterable[Layer], tensors: Mapping[str, NDArray[Any]], config: Mapping[str, Any] | None
) -> dict[str, NDArray[Any]]:
    """`tensors` with float experts as files have them, where an engine calls them otherwise."""
    out = dict(tensors)
    for layer in layers:
        if (
            layer.kind == "experts"
            and layer.stage == "float"
            and all(name.endswith(".weight") for name in layer.stored)
        ):
            parts = {p: out.pop(name) for p, name in zip(layer.projections, layer.stored, strict=True)}
            block = file_name(f"{layer.path}.", config)[:-1]
            out.update(file_stack(block, parts, config or {}))
    return out


def _weights(
    engine: Modules, layer: Layer, config: Mapping[str, Any] | None
) -> Iterable[tuple[str, QTensor[NDArray[Any]]]]:
    """The quantized weights of a converted layer, each with its path in files."""
    if layer.kind != "experts":
        yield layer.path, engine.unpack(layer.module).map(engine.to_numpy)
        return
    q = require(engine, Mixes).unpack_experts(layer.module)
    for (number, projection), path in paths_of(layer.path, layer.projections, config).items():
        yield path, q[projection][number].map(engine.to_numpy)


def _cast(tensors: Mapping[str, NDArray[Any]], dtype: DType, *, but: Collection[str]) -> dict[str, NDArray[Any]]:
    """`tensors` with every float as `dtype`, except those whose names are in `but`."""
    return {
        name: array.astype(dtype) if array.dtype.name in DTYPES and name not in but else array
        for name, array in tensors.items()
    }
