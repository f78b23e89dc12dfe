"""Verification of a directory that qkit wrote: it is whole and unchanged. Names every problem, not only the first."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from qkit.artifact.config import CONFIG, read_config
from qkit.artifact.inspect import check_parts, parts
from qkit.artifact.metadata import StoredRule, check_quantization, layout_of, read_rules
from qkit.artifact.snapshot import read_own
from qkit.errors import ArtifactError, QkitError
from qkit.formats import compressed_tensors
from qkit.formats.row_blocks import row_blocks, rows_of
from qkit.storage.marks import SEAL
from qkit.storage.read import Stored, read_folder
from qkit.storage.seal import Problem, file_problems, read_seal, tensor_problems


def verify(folder: Path) -> Iterator[Problem]:
    """The problems of the artifact or export in `folder`, one at a time. Reads every byte of the weights.

    Raises:
        ArtifactError: qkit did not write the directory.
    """
    seal = read_seal(folder)
    if seal is None:
        raise ArtifactError(
            f"{folder} has no {SEAL}: verify reads the directories that `qkit quantize` and `qkit.save` write"
        )
    yield from file_problems(folder, seal)
    try:
        tensors, metadata = read_folder(folder)
        if layout_of(metadata) != "compressed-tensors":
            yield from tensor_problems(folder, seal, tensors)
            yield from _export(folder)
            return
        rules = read_rules(folder, metadata, None)
    except QkitError as error:
        yield Problem(str(folder), str(error))
        return
    yield from tensor_problems(folder, seal, tensors)
    yield from _weights(folder, tensors, rules)
    try:
        check_quantization(read_config(folder), rules)
    except QkitError as error:
        yield Problem(str(folder / CONFIG), str(error))


def _export(folder: Path) -> Iterator[Problem]:
    """Problems of the weights of an export for another program."""
    try:
        weights = read_own(folder).weights
    except QkitError as error:
        yield Problem(str(folder), str(error), "export the artifact again")
        return
    for weight in weights.values():
        try:
            weight.read()
        except QkitError as error:
            yield Problem(str(folder), str(error), "export the artifact again")


def _weights(folder: Path, tensors: Mapping[str, Stored], rules: list[StoredRule]) -> Iterator[Problem]:
    """Problems of the types, shapes and scales of quantized layers. Reads a block of rows at a time."""
    by_path = parts(tensors)
    for stored in rules:
        for path in stored.paths:
            try:
                _check_layer(by_path.get(path, {}), stored, path=path)
            except (QkitError, ValueError) as error:
                yield Problem(f"{folder}: {path}", str(error))


def _check_layer(found: Mapping[str, Stored], stored: StoredRule, *, path: str) -> None:
    grid, shape = stored.rule.weight, check_parts(found, stored, path=path)
    assert grid is not None
    want = compressed_tensors.contents(grid, dtype=stored.dtype, shape=shape)
    arrays = {name: found[name].mapped() for name in want}
    for begin, end in row_blocks(shape):
        block = rows_of(arrays, begin, end, shape=shape, bits=grid.element.bits)
        compressed_tensors.from_tensors(block, grid=grid, dtype=stored.dtype, shape=(end - begin, *shape[1:]))
