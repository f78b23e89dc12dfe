"""safetensors files as NumPy arrays, mapped rather than read; names, shapes and offsets are checked by safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkit.checkpoint.layout import DTYPES, INDEX, SINGLE, WORDS, Slot
from qkit.checkpoint.output import Stream
from qkit.errors import ArtifactError


def read_file(file: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors of one file, mapped read-only, and its header metadata.

    Raises:
        ArtifactError: it is missing, or not a sound safetensors file.
    """
    from safetensors import SafetensorError, safe_open  # here, so that `import qkit` stays cheap

    try:
        with safe_open(file, framework="np") as opened:  # the checks: header, offsets, overlaps, sizes
            metadata = dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file}: {error}") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    data = (
        np.memmap(file, np.uint8, mode="r", offset=8 + length)
        if file.stat().st_size > 8 + length
        else np.empty(0, np.uint8)
    )
    return {name: _view(file, name, entry, data) for name, entry in header.items() if name != "__metadata__"}, metadata


def read_folder(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The tensors of a folder with one file or with an index of shards, and the metadata of the (first) file.

    Raises:
        ArtifactError: a file is missing, unsound, or outside the folder; or a tensor is missing or stands twice.
    """
    index = folder / INDEX
    if not index.exists():
        return read_file(folder / SINGLE)
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{index}: not an index of shards ({error!r})") from None
    tensors: dict[str, NDArray[Any]] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise ArtifactError(f"{index}: {shard!r} is not a file of this folder")
        found, extra = read_file(folder / shard)
        metadata = metadata or extra
        for name, array in found.items():
            if places.get(name) != shard or name in tensors:
                raise ArtifactError(f"{folder / shard}: {name} stands here but the index puts it in {places.get(name)}")
            tensors[name] = array
    for name in places:
        if name not in tensors:
            raise ArtifactError(f"{index}: {name} is not in {places[name]}")
    return tensors, metadata


def array_stream(name: str, array: NDArray[Any]) -> Stream:
    """`array` as a tensor to write."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return Stream(Slot(name, WORDS[array.dtype.name], array.shape), lambda: [data])


def _view(file: Path, name: str, entry: Mapping[str, Any], data: NDArray[np.uint8]) -> NDArray[Any]:
    if entry["dtype"] not in DTYPES:
        raise ArtifactError(f"{file}: {name} is {entry['dtype']}, which qkit does not read: cast or drop it")
    import ml_dtypes  # noqa: F401  teaches NumPy the names bfloat16 and float8

    begin, end = entry["data_offsets"]
    array: NDArray[Any] = data[begin:end].view(np.dtype(DTYPES[entry["dtype"]][0])).reshape(entry["shape"])
    return array
