"""Verification of a directory that qkit wrote: it is whole and unchanged. Names every problem, not only the first."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qkit.artifact.config import CONFIG, read_config
from qkit.artifact.inspect import check_parts, parts, scale_kind
from qkit.artifact.metadata import StoredRule, check_quantization, layout_of, read_rules
from qkit.artifact.snapshot import read_own
from qkit.errors import ArtifactError, QkitError
from qkit.formats import compressed_tensors
from qkit.formats.packed import Tensors
from qkit.formats.row_blocks import row_blocks, rows_of
from qkit.processes import in_processes
from qkit.storage.batches import batches
from qkit.storage.marks import SEAL
from qkit.storage.read import Stored, map_tensors, read_folder
from qkit.storage.seal import Problem, file_problems, read_seal, tensor_problems


def verify(folder: Path, *, workers: int = 1) -> Iterator[Problem]:
    """The problems of the artifact or export in `folder`, one at a time. Reads every byte of the weights.

    Args:
        workers: processes that look at the values of an artifact. Digests are computed on all cores in any case.

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
    yield from _weights(folder, tensors, rules, workers=workers)
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


Layer = tuple[str, StoredRule, Mapping[str, Stored]]


def _weights(
    folder: Path, tensors: Mapping[str, Stored], rules: list[StoredRule], *, workers: int
) -> Iterator[Problem]:
    """Problems of the types, shapes and scales of quantized layers. Reads a block of rows at a time."""
    by_path = parts(tensors)
    layers = ((path, stored, by_path.get(path, {})) for stored in rules for path in stored.paths)
    for found in in_processes(_check_layers, batches(layers, _nbytes), workers=workers):
        for path, fault in found:
            yield Problem(f"{folder}: {path}", fault)


def _nbytes(layer: Layer) -> int:
    return sum(stored.slot.nbytes for stored in layer[2].values())


def _check_layers(layers: Sequence[Layer]) -> list[tuple[str, str]]:
    """The faults of some layers, each with the layer's path."""
    stored = (one for _, _, found in layers for one in found.values())
    arrays = map_tensors({one.slot.name: one for one in stored if one.slot.dtype != "BOOL"})  # no code and no scale
    faults = []
    for path, rule, found in layers:
        try:
            _check_layer({name: arrays[stored.slot.name] for name, stored in found.items()}, found, rule, path=path)
        except (QkitError, ValueError) as error:
            faults.append((path, str(error)))
    return faults


def _check_layer(arrays: Tensors, found: Mapping[str, Stored], stored: StoredRule, *, path: str) -> None:
    grid, shape = stored.rule.weight, check_parts(found, stored, path=path)
    assert grid is not None
    form = compressed_tensors.stored_form(found, grid)
    options: dict[str, Any] = {"dtype": stored.dtype, "shape": shape, "form": form, "kind": scale_kind(found)}
    want = compressed_tensors.contents(grid, **options)
    mine = {name: arrays[name] for name in want}
    for begin, end in row_blocks(shape):
        block = rows_of(mine, begin, end, shape=shape, bits=grid.element.bits)
        compressed_tensors.restore(block, grid=grid, dtype=stored.dtype, shape=(end - begin, *shape[1:]))
