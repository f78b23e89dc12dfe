"""A directory in one layout to a directory in another, exactly or not at all: nothing is ever quantized again."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qkit.artifact.config import describing
from qkit.artifact.directory import CONFIG, companions, quantized_config
from qkit.artifact.metadata import KEY, Entry, describe
from qkit.engines.layer import Layer
from qkit.errors import ArtifactError
from qkit.exchange.snapshot import Held, Snapshot, join
from qkit.formats import compressed_tensors, dense, mlx_config, mlx_lm
from qkit.formats.settings import QUANTIZATION
from qkit.rules import Rule, rule_table
from qkit.storage.arrays import array_stream
from qkit.storage.destination import destination
from qkit.storage.layout import SHARD_BYTES, WORDS, Slot
from qkit.storage.write import Stream, write_directory
from qkit.streaming.families import HEAD, layer_of

BLOCK = 1 << 20  #: numbers that are decoded together
MOVING = {"activation": "its inputs", "output": "its outputs"}  #: keys of a rule that other layouts have no word for
#: Names of the tensors that go with them.
STATIC = tuple(f"{slot}_{name}" for slot in ("input", "output") for name in ("scale", "zero_point", "global_scale"))


def export_mlx(source: Snapshot, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `source` as a directory that mlx-lm opens: the same words under other names.

    Raises:
        ArtifactError: MLX cannot hold a layer's grid; the message names it. Or see `Output`.
        BackendError: mlx-lm computes another model from such a configuration; see `mlx_config.model_config`.
    """
    check_moving(source, source.weights)
    containers = {}
    for path, held in source.weights.items():
        assert held.rule.weight is not None
        try:
            containers[path] = mlx_lm.layout(held.rule.weight, held.shape[-1])
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
    config, added = source.config, []
    if config is not None:
        with describing(source.folder / CONFIG):
            config = mlx_config.model_config(config, tied=source.tied)
        added = sorted(config.keys() - (source.config or {}).keys())
        if containers:  # under both names, as mlx_lm.convert writes it
            config = {**config, **dict.fromkeys(QUANTIZATION, mlx_config.quantization_config(containers))}
    for name, array in source.tensors.items():
        if array.ndim > 2 and ".experts." in name:
            raise ArtifactError(
                f"{name}: mlx-lm reads experts one by one, not stacked: export what `qkit quantize` made"
            )
    about = {**json.loads(describe(entries(source))), "layout": "mlx", "added": added}
    _write(_outward(source), out, mlx_lm, about, config, shard_bytes)


def export_dense(source: Snapshot, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `source` as a float model: the values that the codes stand for, in the type that was quantized.

    Raises:
        ArtifactError: see `Output`.
    """
    check_moving(source, source.weights)
    _write(source, out, dense, None, source.config, shard_bytes)


def to_artifact(source: Snapshot, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes `source` as qkit's own artifact, which `qkit.load` opens; codes and scales as they are.

    Raises:
        ArtifactError: see `Output`.
    """
    check_moving(source, [path for path, held in source.weights.items() if held.unknown])
    for path, held in source.weights.items():
        assert held.rule.weight is not None
        try:
            compressed_tensors.layout(held.rule.weight)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}") from None
    known = source.config or {}
    layers = [layer_of(Slot(name, WORDS[a.dtype.name], a.shape), known) for name, a in source.tensors.items()]
    alone = [layer.path for layer in layers if isinstance(layer, Layer) and layer.kind == "linear"]
    alone += [HEAD] if source.tied else []
    config = quantized_config(source.config, entries(source), left_alone=alone)
    _write(source, out, compressed_tensors, json.loads(describe(entries(source))), config, shard_bytes)


def weights_only(source: Snapshot) -> Snapshot:
    """`source` without what its layers do to their inputs and outputs: another model, with the same weights."""
    moving = {path for path, held in source.weights.items() if _moving(held)}
    static = {join(path, name) for path in moving for name in STATIC}
    weights = {path: _without_moving(held) for path, held in source.weights.items()}
    tensors = {name: array for name, array in source.tensors.items() if name not in static}
    return replace(source, weights=weights, tensors=tensors)


def check_moving(source: Snapshot, paths: Iterable[str]) -> None:
    """For targets that cannot say what layers do to their inputs and outputs.

    Raises:
        ArtifactError: one of the layers at `paths` quantizes them.
    """
    for path in paths:
        if moving := _moving(source.weights[path]):
            raise ArtifactError(
                f"{source.folder}: {path} quantizes {moving} too, which would be lost: --weights-only does without, for a model "
                "with the same weights and other logits"
            )


def _moving(held: Held) -> str:
    """What a layer quantizes besides its weight."""
    return held.unknown or " and ".join(MOVING[key] for key in rule_table(held.rule) if key in MOVING)


def _without_moving(held: Held) -> Held:
    return replace(held, rule=Rule(("*",), kind=held.rule.kind, weight=held.rule.weight), unknown="")


def entries(source: Snapshot) -> list[Entry]:
    """The rules of `source`, each once per type of weight, with the paths of its layers."""
    paths: dict[tuple[Rule, Any], list[str]] = {}
    for path, held in source.weights.items():
        paths.setdefault((held.rule, held.dtype), []).append(path)
    ordered = sorted(paths.items(), key=lambda item: min(item[1]))
    return [Entry(rule, dtype, tuple(sorted(mine))) for (rule, dtype), mine in ordered]


def _outward(source: Snapshot) -> Snapshot:
    """`source` with the names that mlx-lm has for its tensors."""
    config = source.config or {}
    weights = {mlx_config.outward(f"{path}.", config)[:-1]: held for path, held in source.weights.items()}
    return replace(
        source, weights=weights, tensors={mlx_config.outward(n, config): a for n, a in source.tensors.items()}
    )


def _write(
    source: Snapshot,
    out: str | Path,
    layout: Any,
    about: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    shard_bytes: int,
) -> None:
    if destination(out).path == source.folder.resolve():
        raise ArtifactError(f"{out} is what is to be read: choose another folder")
    streams = [array_stream(name, array) for name, array in source.tensors.items()]
    for path, held in source.weights.items():
        streams.extend(_streams(path, held, layout))
    write_directory(
        Path(out),
        streams,
        metadata={"format": "pt"} if about is None else {KEY: json.dumps(about, sort_keys=True)},
        files=companions(source.folder, config=config),
        shard_bytes=shard_bytes,
    )


def _streams(path: str, held: Held, layout: Any) -> Iterable[Stream]:
    """The tensors of one weight in `layout`, made when they are written."""
    assert held.rule.weight is not None
    for name, (kind, shape) in layout.contents(held.rule.weight, dtype=held.dtype, shape=held.shape).items():
        yield Stream(Slot(join(path, name), WORDS[kind], shape), _blocks(path, held, layout, name))


def _blocks(path: str, held: Held, layout: Any, name: str) -> Callable[[], Iterable[memoryview]]:
    def blocks() -> Iterable[memoryview]:
        packed = held.read()
        for part in packed.blocks(BLOCK) if layout is dense else [packed]:
            try:
                block = layout.store(part)[name]
            except ArtifactError as error:
                raise ArtifactError(f"{path}: {error}") from None
            yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data

    return blocks
