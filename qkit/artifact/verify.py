"""Whether a directory that qkit wrote is whole, and still what was written. Every problem is named, not the first alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from qkit.artifact.directory import CONFIG, read_config
from qkit.artifact.inspect import check_parts, parts
from qkit.artifact.metadata import Entry, check_quantization, entries_of
from qkit.errors import ArtifactError, QkitError
from qkit.exchange.snapshot import layout_of, read_unsealed
from qkit.formats import compressed_tensors
from qkit.storage.marks import SEAL
from qkit.storage.read import Stored, read_folder
from qkit.storage.seal import Problem, file_problems, read_seal, tensor_problems
from qkit.streaming.blocks import row_blocks, rows_of


def verify(folder: Path) -> Iterator[Problem]:
    """Everything that is wrong with the artifact in `folder`, one at a time; reads every byte of the weights.

    Raises:
        ArtifactError: qkit did not write it.
    """
    seal = read_seal(folder)
    if seal is None:
        raise ArtifactError(f"{folder} has no {SEAL}: verify reads what `qkit quantize` or `qkit.save` wrote")
    yield from file_problems(folder, seal)
    try:
        tensors, metadata = read_folder(folder)
        if layout_of(metadata) != "compressed-tensors":
            yield from tensor_problems(folder, seal, tensors)
            yield from _export(folder)
            return
        entries = entries_of(folder, metadata, None)
    except QkitError as error:
        yield Problem(str(folder), str(error))
        return
    yield from tensor_problems(folder, seal, tensors)
    yield from _rules(folder, tensors, entries)
    try:
        check_quantization(read_config(folder), entries)
    except QkitError as error:
        yield Problem(str(folder / CONFIG), str(error))


def _export(folder: Path) -> Iterator[Problem]:
    """What is wrong with the weights of an export for another program."""
    try:
        weights = read_unsealed(folder).weights
    except QkitError as error:
        yield Problem(str(folder), str(error), "export the artifact again")
        return
    for held in weights.values():
        try:
            held.read()
        except QkitError as error:
            yield Problem(str(folder), str(error), "export the artifact again")


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
