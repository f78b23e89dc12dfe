"""A snapshot written as a directory in another layout, exactly or not at all: no weight is quantized again."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qkit.artifact.companions import companions
from qkit.artifact.metadata import KEY, StoredRule, group_paths
from qkit.artifact.snapshot import Snapshot, StoredWeight
from qkit.errors import ArtifactError
from qkit.exchange.dense_stacks import dense_stacks
from qkit.formats import compressed_tensors, dense, mlx_lm
from qkit.formats.mapped import mapped, mlx_tensors
from qkit.formats.packed import Tensors, join
from qkit.rules import Rule, rule_table
from qkit.sources.decoded import DecodedArray
from qkit.storage.arrays import array_stream
from qkit.storage.destination import destination
from qkit.storage.layout import SHARD_BYTES, TYPE_NAMES, Slot
from qkit.storage.swap import bring_to_disk
from qkit.storage.write import Stream, write_directory

BLOCK: Final = 1 << 20  #: numbers that are dequantized together
ACTIVATIONS: Final = {"activation": "its inputs", "output": "its outputs"}  #: rule keys that other layouts cannot state
#: Names of the tensors that belong to those keys.
STATIC: Final = tuple(
    f"{slot}_{name}" for slot in ("input", "output") for name in ("scale", "zero_point", "global_scale")
)


def write_model(
    source: Snapshot,
    out: str | Path,
    layout: Any,
    *,
    about: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    shard_bytes: int | None,
    more: Iterable[Stream] = (),
    bring: Callable[[int], None] = bring_to_disk,
) -> None:
    """Writes `source` as the directory `out`.

    Args:
        layout: module of `qkit.formats` that stores the weights.
        about: content of qkit's metadata key; None for a directory that qkit will not recognize as its own.
        config: content of the `config.json`; None writes none.
        shard_bytes: most bytes of tensors in one file; None: about as many as in the files of `source`.
        more: tensors to write besides.
        bring: brings the bytes of an open file to the disk; see `Output`.

    Raises:
        ArtifactError: `out` is the source; a weight does not fit the layout; or see `Output`.
    """
    if destination(out).path == source.folder.resolve():
        raise ArtifactError(f"{out} is the model to read: choose another folder")
    stacks, inside = dense_stacks(source.weights, config or {}) if layout is dense else ([], set())
    streams = [*more, *stacks, *(_stream(name, array) for name, array in source.tensors.items())]
    for path, weight in source.weights.items():
        streams.extend(weight_streams(path, weight, layout) if path not in inside else ())
    write_directory(
        Path(out),
        streams,
        metadata={"format": "pt"} if about is None else {KEY: json.dumps(about, sort_keys=True)},
        files={**source.files, **companions(source.folder, config=config)},
        shard_bytes=shard_bytes or _shard_bytes(source.folder),
        known=source.sealed,
        bring=bring,
    )


def _shard_bytes(folder: Path) -> int:
    """Most bytes of a file of `folder` if there are several: as many files can be written at one time."""
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")] if folder.is_dir() else []
    return min(max(sizes), SHARD_BYTES) if len(sizes) > 1 else SHARD_BYTES


def rules_of(source: Snapshot) -> list[StoredRule]:
    """The rules of `source`, each once for each type of weight, with the paths of its layers."""
    return group_paths((weight.rule, weight.dtype, path) for path, weight in source.weights.items())


def weights_only(source: Snapshot) -> Snapshot:
    """`source` without quantized inputs and outputs: a model with the same weights and other logits."""
    paths = {path for path, weight in source.weights.items() if _activations(weight)}
    static = {join(path, name) for path in paths for name in STATIC}
    weights = {path: _without_activations(weight) for path, weight in source.weights.items()}
    tensors = {name: array for name, array in source.tensors.items() if name not in static}
    return replace(source, weights=weights, tensors=tensors)


def check_weights_only(source: Snapshot, paths: Iterable[str]) -> None:
    """Checks that the layers at `paths` quantize nothing but weights, for layouts that cannot state anything else.

    Raises:
        ArtifactError: one of the layers quantizes its inputs or outputs.
    """
    for path in paths:
        if activations := _activations(source.weights[path]):
            raise ArtifactError(
                f"{source.folder}: {path} quantizes {activations} too, which would be lost: --weights-only does without, for a "
                "model with the same weights and other logits"
            )


def _stream(name: str, array: Any) -> Stream:
    """A tensor that is no weight on a grid. Codes of another program are decoded when their bytes are written."""
    if not isinstance(array, DecodedArray):
        return array_stream(name, array)
    encoded = array.encoded
    slot = replace(encoded.slot, name=name)
    return Stream(slot, lambda: (_bytes(block) for _, block in encoded.blocks()))


def weight_streams(path: str, weight: StoredWeight, layout: Any) -> Iterable[Stream]:
    """The tensors of one weight in `layout`. Their bytes are computed when they are written."""
    assert weight.rule.weight is not None
    scale = {"kind": weight.kind} if weight.kind and layout is not dense else {}
    options: dict[str, Any] = {"dtype": weight.dtype, "shape": weight.shape, **_form(weight, layout), **scale}
    contents = layout.contents(weight.rule.weight, **options)
    stored = _Stored(path, weight, layout)
    for name, (kind, shape) in contents.items():
        blocks = _dense_blocks(path, weight) if layout is dense else stored.blocks(name)
        yield Stream(Slot(join(path, name), TYPE_NAMES[kind], shape), blocks)


def _activations(weight: StoredWeight) -> str:
    """Names the inputs or outputs that the layer quantizes besides its weight; empty where there are none."""
    return weight.unknown or " and ".join(ACTIVATIONS[key] for key in rule_table(weight.rule) if key in ACTIVATIONS)


def _without_activations(weight: StoredWeight) -> StoredWeight:
    return replace(weight, rule=Rule(("*",), kind=weight.rule.kind, weight=weight.rule.weight), unknown="")


def _form(weight: StoredWeight, layout: Any) -> dict[str, str]:
    return {"form": layout.form_of(weight.rule)} if layout is compressed_tensors else {}


class _Stored:
    """The tensors of one weight in a layout, computed together when the first of them is written, and released one by one.

    Threads may take them at one time: at worst, a tensor is computed twice.
    """

    def __init__(self, path: str, weight: StoredWeight, layout: Any) -> None:
        self._path, self._weight, self._layout = path, weight, layout
        self._made: Tensors = {}

    def blocks(self, name: str) -> Callable[[], Iterable[memoryview]]:
        """Returns the bytes of the tensor `name`, as one block."""
        return lambda: [_bytes(self._take(name))]

    def _take(self, name: str) -> NDArray[Any]:
        made = self._made if name in self._made else self._make()
        self._made = {other: array for other, array in made.items() if other != name}
        return made[name]

    def _make(self) -> Tensors:
        if self._layout is mlx_lm and (plain := _mapped(self._weight)) is not None:
            return plain
        with _locating(self._path):
            made: Tensors = self._layout.store(self._weight.read(), **_form(self._weight, self._layout))
            return made


def _mapped(weight: StoredWeight) -> Tensors | None:
    assert weight.rule.weight is not None
    plain = mapped(weight.parts, grid=weight.rule.weight, dtype=weight.dtype, shape=weight.shape)
    return None if plain is None else mlx_tensors(plain)


def _dense_blocks(path: str, weight: StoredWeight) -> Callable[[], Iterable[memoryview]]:
    def blocks() -> Iterable[memoryview]:
        with _locating(path):
            for part in weight.read().blocks(BLOCK):
                yield _bytes(dense.store(part)["weight"])

    return blocks


@contextmanager
def _locating(path: str) -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
