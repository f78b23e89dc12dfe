"""Whether a directory that qkit wrote is whole, and still what was written. Every problem is named, not the first alone."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qkit.artifact.directory import CONFIG, quantized_config, read_config
from qkit.artifact.entries import KEY, Entry, entries_of
from qkit.checkpoint.blocks import row_blocks, rows_of
from qkit.checkpoint.inspection import check_parts, parts
from qkit.checkpoint.output import SEAL
from qkit.checkpoint.pen import CHUNK
from qkit.checkpoint.source import INDEX_BYTES, Stored, is_pickle, read_folder, read_json
from qkit.errors import ArtifactError, QkitError
from qkit.interop import compressed_tensors
from qkit.interop.snapshot import layout_of, read

AGAIN = "quantize or save the model again"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a file or a tensor, and the way out."""

    where: str
    what: str
    remedy: str = AGAIN

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.remedy}"


def verify(folder: Path) -> Iterator[Problem]:
    """Everything that is wrong with the artifact in `folder`, one at a time; reads every byte of the weights.

    Raises:
        ArtifactError: qkit did not write it.
    """
    seal = read_json(folder / SEAL, most=INDEX_BYTES)
    if seal is None or not _is_seal(seal):
        raise ArtifactError(f"{folder} has no sound {SEAL}: verify reads what `qkit quantize` or `qkit.save` wrote")
    yield from _files(folder, seal)
    try:
        tensors, metadata = read_folder(folder)
        if layout_of(metadata) != "compressed-tensors":
            yield from _digests(folder, seal, tensors)
            yield from _export(folder)
            return
        entries = entries_of(folder, metadata, read_config(folder))
    except QkitError as error:
        yield Problem(str(folder), str(error))
        return
    yield from _digests(folder, seal, tensors)
    yield from _rules(folder, tensors, entries)
    yield from _config(folder, entries)


def _is_seal(seal: Mapping[str, Any]) -> bool:
    if [type(seal.get(key)) for key in ("files", "headers", "tensors")] != [list, dict, dict]:
        return False
    names = [*map(str, seal["files"]), *seal["headers"]]
    return all(name == Path(name).name and name.isprintable() for name in names)


def _export(folder: Path) -> Iterator[Problem]:
    """What is wrong with the weights of an export for another program."""
    try:
        weights = read(folder).weights
    except QkitError as error:
        yield Problem(str(folder), str(error), "export the artifact again")
        return
    for held in weights.values():
        try:
            held.read()
        except QkitError as error:
            yield Problem(str(folder), str(error), "export the artifact again")


def _files(folder: Path, seal: Mapping[str, Any]) -> Iterator[Problem]:
    for name in map(str, seal["files"]):
        if not (folder / name).is_file():
            yield Problem(str(folder / name), "is missing")
    for entry in sorted(folder.iterdir()):
        if (entry.suffix == ".safetensors" or is_pickle(entry.name)) and entry.name not in seal["files"]:
            yield Problem(str(entry), "is a weights file that qkit did not write, and readers may open it", "remove it")
    for name, digest in seal["headers"].items():
        if (folder / name).is_file() and _header_digest(folder / name) != digest:
            yield Problem(str(folder / name), "its header is not the one that was written")


def _digests(folder: Path, seal: Mapping[str, Any], tensors: Mapping[str, Stored]) -> Iterator[Problem]:
    for name in sorted(seal["tensors"].keys() | tensors.keys()):
        if name not in tensors:
            yield Problem(str(folder), f"{name} is missing")
        elif name not in seal["tensors"]:
            yield Problem(f"{tensors[name].file}: {name}", "was not written by qkit")
        elif _digest(tensors[name]) != seal["tensors"][name]:
            yield Problem(f"{tensors[name].file}: {name}", "its bytes are not those that were written")


def _rules(folder: Path, tensors: Mapping[str, Stored], entries: list[Entry]) -> Iterator[Problem]:
    """Types, shapes and scales of every quantized layer, some rows in memory at a time."""
    by_path = parts(tensors)
    for entry in entries:
        for path in entry.paths:
            try:
                _check_layer(by_path.get(path, {}), entry, path=path)
            except (QkitError, ValueError) as error:
                yield Problem(f"{folder}: {path}", str(error))


def _check_layer(found: Mapping[str, Stored], entry: Entry, *, path: str) -> None:
    grid, shape = entry.rule.weight, check_parts(found, entry, path=path)
    assert grid is not None
    want = compressed_tensors.contents(grid, dtype=entry.dtype, shape=shape)
    arrays = {name: found[name].mapped() for name in want}
    for begin, end in row_blocks(shape):
        block = rows_of(arrays, begin, end, shape=shape, bits=grid.element.bits)
        compressed_tensors.from_tensors(block, grid=grid, dtype=entry.dtype, shape=(end - begin, *shape[1:]))


def _config(folder: Path, entries: list[Entry]) -> Iterator[Problem]:
    config = read_config(folder)
    if config is None:
        return
    said = config.get("quantization_config") or {}
    want = (quantized_config({}, entries, left_alone=[]) or {}).get("quantization_config", {})
    if not isinstance(said, Mapping) or said.get("config_groups") != want.get("config_groups"):
        yield Problem(str(folder / CONFIG), f"its quantization_config is not that of the {KEY} metadata")


def _header_digest(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(8)
        return hashlib.sha256(
            start + stream.read(min(int.from_bytes(start, "little"), file.stat().st_size))
        ).hexdigest()


def _digest(stored: Stored) -> str:
    found = hashlib.sha256()
    with stored.file.open("rb") as stream:
        stream.seek(stored.begin)
        left = stored.slot.nbytes
        while left and (data := stream.read(min(CHUNK, left))):
            found.update(data)
            left -= len(data)
    return found.hexdigest()
