"""Carrying out a plan: tensors stream from the source to the output block by block, in several processes."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16
import numpy as np
from numpy.typing import NDArray

from qkit import native
from qkit.engines.protocol import Arrays
from qkit.errors import ArtifactError
from qkit.fitting.fits import Fit
from qkit.formats import compressed_tensors
from qkit.formats.packed import pack
from qkit.formats.row_blocks import part_rows
from qkit.grid import Grid
from qkit.processes import in_processes
from qkit.reference.packing import Packed
from qkit.sources.encoded import Encoded, parts_of
from qkit.storage.batches import batches
from qkit.storage.destination import destination
from qkit.storage.layout import DTYPES, Place, Slot
from qkit.storage.parts import Part, Whole, join, part_output
from qkit.storage.read import check_bools
from qkit.storage.tensor_writer import TensorWriter
from qkit.streaming import fast_reference
from qkit.streaming.blocks import (
    PATTERNS,
    Quantize,
    check_finite,
    encode,
    sees_whole_tensor,
)
from qkit.streaming.plan import Plan, Row
from qkit.streaming.weights import Reader, Weight, name_of, weights_of

COPY = 1 << 20  #: bytes of a block of a copied tensor
Tick = Callable[[str, int], None]
Task = tuple[Row, Mapping[str, Place]]


def quantize_directory(
    plan: Plan, folder: Path, *, engine: Arrays, workers: int, tick: Tick, part: Part | None = None
) -> Path:
    """Writes the output of `plan` to `folder`, whole or not at all. After an interruption, the same call resumes.

    Args:
        engine: the engine that quantizes. The bits of the codes do not depend on it.
        workers: processes for the NumPy engine. Any other engine works in this process alone.
        tick: called with the name and the bytes of each finished source tensor.
        part: the part to write, beside `folder`; None writes the whole.

    Returns:
        The folder.

    Raises:
        RangeError: a weight has a value without codes, or a copied tensor has a NaN or an infinity.
        ArtifactError, PlanError, LockedError, OSError: see `Output` and `part_output`; or the source ended early.
    """
    check_apart(folder, plan.folder)
    whole = _whole(plan, folder)
    with plan.output(folder, fingerprint=whole.source) if part is None else part_output(whole, part) as output:
        missing = set(output.missing)
        rows = rows_of(plan, missing)
        tick("", sum(row.stored.slot.nbytes for row in rows_of(plan, output.layout.places.keys() - missing)))
        rows.sort(key=lambda row: -row.stored.slot.nbytes)  # the largest first, so that all processes end together
        fit = plan.fit.on(engine) if plan.fit else None
        in_numpy = engine.name == "numpy" or (fit is not None and not _solves(fit, plan))
        work = partial(
            _make,
            folder=output.aside,
            quantize=_quantize_here if in_numpy else partial(_quantize_on, engine),
            fit=fit,
        )
        places = output.layout.places
        tasks = ((row, {slot.name: places[slot.name] for slot in row.slots if slot.name in places}) for row in rows)
        for found in in_processes(work, batches(tasks, _nbytes), workers=workers if in_numpy else 1):
            for stored, digests in found:
                for name, digest in digests.items():
                    output.close(name, digest=digest)
                tick(stored.name, stored.nbytes)
    return folder


def join_parts(plan: Plan, folder: Path) -> None:
    """Puts the output of `plan` together from its parts, which other calls have written. Raises as `join`."""
    check_apart(folder, plan.folder)
    join(_whole(plan, folder))


def rows_of(plan: Plan, names: Collection[str]) -> list[Row]:
    """The rows that make tensors of `names`."""
    return [row for row in plan.rows if any(slot.name in names for slot in row.slots)]


def _solves(fit: Fit, plan: Plan) -> bool:
    """Whether the engine of `fit` solves any weight of `plan`; else the law fits on the host, whatever the engine."""
    return any(fit.solves(row.rule.weight) for row in plan.rows if row.rule and row.rule.weight)


def _whole(plan: Plan, folder: Path) -> Whole:
    return Whole(folder, plan.layout, plan.files, fingerprint(plan))


def check_apart(out: Path, source: Path) -> None:
    """Checks that `out` is not the place of `source`, the model to read.

    Raises:
        ArtifactError: it is.
    """
    if destination(out).path == source.resolve():
        raise ArtifactError(f"{out} is the model itself: choose another folder")


def fingerprint(plan: Plan) -> str:
    """Identity of the source, independent of its path: name, size, header and time of last change of each file.

    Tensors are not digested, since reading them at every start would cost as much as quantizing them. A changed weight under an
    old time stamp is not noticed. A copy of the source with new time stamps begins a new run.
    """
    stamps = []
    stored = [one for row in plan.rows for one in parts_of(row.stored)]
    for file in sorted({one.file for one in stored}):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = hashlib.sha256(stream.read(length)).hexdigest()
        status = file.stat()
        stamps.append([file.name, status.st_size, status.st_mtime_ns, header])
    return json.dumps(stamps)


# One tensor


def _nbytes(task: Task) -> int:
    return task[0].stored.slot.nbytes


def _make(
    tasks: Sequence[Task], *, folder: Path, quantize: Quantize, fit: Fit | None
) -> list[tuple[Slot, dict[str, str]]]:
    """Writes the output of each row into the files of `folder`: the tensors that have places.

    Returns:
        The slot of each source tensor, and the digests of the tensors that were written for it.
    """
    fast_reference.keep_memory()
    writer = TensorWriter(folder, {name: place for _, places in tasks for name, place in places.items()})
    try:
        return [(row.stored.slot, _make_row(row, places, writer, quantize, fit)) for row, places in tasks]
    finally:
        writer.close()


def _make_row(
    row: Row, places: Mapping[str, Place], writer: TensorWriter, quantize: Quantize, fit: Fit | None
) -> dict[str, str]:
    reader = Reader(row.stored)
    try:
        if fit and fit.corrects(row.path) and not row.rule:
            _correct(row, writer, reader, fit)
        elif row.rule is None or row.rule.weight is None:
            _copy(row, writer, reader)
        else:
            _quantize(row, row.rule.weight, places, writer, reader, quantize, fit)
        return {name: writer.digest(name) for name in places}
    finally:
        reader.close()


def _copy(row: Row, writer: TensorWriter, reader: Reader) -> None:
    stored, size = row.stored, row.stored.slot.nbytes
    if isinstance(stored, Encoded):
        _copy_values(stored, row.slots[0].name, writer)
        return
    for begin in range(0, size, COPY):
        data = reader.read(begin, min(begin + COPY, size))
        if stored.slot.dtype == "BOOL":
            check_bools(data, name=name_of(stored))
        if row.dtype in PATTERNS:
            first = begin // DTYPES[stored.slot.dtype][1]
            check_finite(data.view(row.dtype), name=name_of(stored), first=first, shape=stored.slot.shape)
        writer.write(row.slots[0].name, data.data, offset=begin)


def _correct(row: Row, writer: TensorWriter, reader: Reader, fit: Fit) -> None:
    """Writes the weight of an output head in its type, corrected for the drift of the fitted blocks before it."""
    offset = 0
    for _, w in Weight(row, reader).blocks():
        data = _bytes(fit.head(w, row.path))
        writer.write(row.slots[0].name, data, offset=offset)
        offset += len(data)


def _copy_values(stored: Encoded, name: str, writer: TensorWriter) -> None:
    """Writes the values of another program's codes, some rows at a time; one matrix at a time where it is transposed."""
    shape, offset = stored.slot.shape, 0
    for first, block in stored.blocks():
        check_finite(block.reshape(-1), name=name_of(stored), first=first, shape=shape)
        data = _bytes(block)
        writer.write(name, data, offset=offset)
        offset += len(data)


def _quantize(
    row: Row,
    grid: Grid,
    places: Mapping[str, Place],
    writer: TensorWriter,
    reader: Reader,
    quantize: Quantize,
    fit: Fit | None,
) -> None:
    assert row.rule is not None
    form = compressed_tensors.form_of(row.rule)
    shape, per_weight = row.shape, len(row.slots) // len(row.paths)
    for number, weight in enumerate(weights_of(row, reader)):
        mine = row.slots[number * per_weight : (number + 1) * per_weight]
        slots = [slot for slot in mine if slot.name in places]  # another part of the output may have the others
        if not slots:
            continue
        blocks = (
            _blocks(weight, grid, form, quantize)
            if fit is None
            else _fitted(weight, row.paths[number], grid, form, fit)
        )
        for begin, parts in blocks:
            parts |= compressed_tensors.server_tensors(row.rule)
            for slot in slots:
                name = slot.name.rpartition(".")[2]
                part = np.array(shape, np.int64) if name == "weight_shape" else parts[name]
                first = part_rows(slot.shape, begin, shape=shape, bits=grid.element.bits)
                if first is not None:
                    writer.write(slot.name, _bytes(part), offset=first * (slot.nbytes // slot.shape[0]))


def _blocks(weight: Weight, grid: Grid, form: str, quantize: Quantize) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """The stored parts of blocks of rows by the rule of `grid`, each with the number of its first row."""
    extremes = weight.extremes(shared=grid.scale == "nvfp4") if sees_whole_tensor(grid) else None
    for begin, w in weight.blocks():
        yield begin, encode(w, grid, quantize=quantize, extremes=extremes, form=form)


def _fitted(
    weight: Weight, path: str, grid: Grid, form: str, fit: Fit
) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """As `_blocks`, with fitted codes."""
    peak = max(map(abs, weight.extremes(shared=True))) if grid.scale == "nvfp4" else None
    blocks = weight.blocks()
    if grid.group == "tensor" or fit.solves(grid):  # one scale for all rows; a device takes all rows at once
        blocks = iter([(0, np.concatenate([w.copy() for _, w in blocks]))])
    for begin, w in blocks:
        yield begin, compressed_tensors.store(pack(fit.quantize(w, grid, path=path, peak=peak, first=begin)), form)


def _quantize_here(w: NDArray[Any], grid: Grid) -> Packed:
    return native.quantize_packed(w, grid) if native.available() else pack(fast_reference.quantize(w, grid))


def _quantize_on(engine: Arrays, w: NDArray[Any], grid: Grid) -> Packed:
    return pack(engine.quantize(engine.from_numpy(w), grid).map(engine.to_numpy))


def _bytes(part: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
