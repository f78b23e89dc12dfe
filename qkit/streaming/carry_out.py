"""Carrying out a plan: tensors stream from the source to the output block by block, one tensor in each process."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16
import numpy as np
from numpy.typing import NDArray

from qkit import native
from qkit.engines.protocol import Arrays
from qkit.errors import ArtifactError
from qkit.formats.packed import pack
from qkit.formats.row_blocks import part_rows
from qkit.grid import Grid
from qkit.reference.packing import Packed
from qkit.storage.destination import destination
from qkit.storage.layout import DTYPES, Place
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
from qkit.streaming.weights import Reader, name_of, weights_of

COPY = 1 << 20  #: bytes of a block of a copied tensor
WORKERS = min(os.cpu_count() or 1, 4)  #: more processes would wait for the disk, and each takes memory
HEARTBEAT = 0.2  #: seconds after which a worker checks again that its parent lives
Tick = Callable[[str, int], None]
Task = tuple[Row, Mapping[str, Place]]
Digests = dict[str, str]
Work = Callable[[Row, Mapping[str, Place]], Digests]


def quantize_directory(plan: Plan, folder: Path, *, engine: Arrays, workers: int, tick: Tick) -> Path:
    """Writes the output of `plan` to `folder`, whole or not at all. After an interruption, the same call resumes.

    Args:
        engine: the engine that quantizes. The bits of the codes do not depend on it.
        workers: processes for the NumPy engine. Any other engine works in this process alone.
        tick: called with the name and the bytes of each finished source tensor.

    Returns:
        The folder.

    Raises:
        RangeError: a weight has a value without codes, or a copied tensor has a NaN or an infinity.
        ArtifactError, PlanError, LockedError, OSError: see `Output`; or the source ended early.
    """
    check_apart(folder, plan.folder)
    with plan.output(folder, fingerprint=fingerprint(plan)) as output:
        missing = set(output.missing)
        rows = [row for row in plan.rows if any(slot.name in missing for slot in row.slots)]
        tick("", sum(row.stored.slot.nbytes for row in plan.rows) - sum(row.stored.slot.nbytes for row in rows))
        rows.sort(key=lambda row: -row.stored.slot.nbytes)  # the largest first, so that all processes end together
        in_numpy = engine.name == "numpy"
        quantize = _quantize_here if in_numpy else partial(_quantize_on, engine)
        work = partial(_make, folder=output.aside, quantize=quantize)
        tasks = [(row, {slot.name: output.layout.places[slot.name] for slot in row.slots}) for row in rows]
        run = partial(_in_processes, workers=workers) if in_numpy and workers > 1 else _in_turn
        for row, digests in run(work, tasks):
            for name, digest in digests.items():
                output.close(name, digest=digest)
            tick(row.stored.slot.name, row.stored.slot.nbytes)
    return folder


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
    for file in sorted({row.stored.file for row in plan.rows}):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = hashlib.sha256(stream.read(length)).hexdigest()
        status = file.stat()
        stamps.append([file.name, status.st_size, status.st_mtime_ns, header])
    return json.dumps(stamps)


# Processes, not threads: NumPy's calls here take microseconds, and between calls threads would wait for each other


def _in_processes(work: Work, tasks: Iterable[Task], *, workers: int) -> Iterator[tuple[Row, Digests]]:
    """Each row with the result of `work`, in the order of completion. The first error ends all work."""
    context = get_context("fork" if sys.platform == "linux" else "spawn")  # elsewhere, frameworks do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(os.getpid(),)) as pool:
        try:
            pending = {pool.submit(work, row, places): row for row, places in tasks}
            for done in as_completed(pending):
                yield pending[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _in_turn(work: Work, tasks: Iterable[Task]) -> Iterator[tuple[Row, Digests]]:
    """As `_in_processes`, in this process."""
    for row, places in tasks:
        yield row, work(row, places)


def _begin(parent: int) -> None:
    """Prepares a worker: the parent handles Ctrl-C, and the worker ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    native.use_threads(1)  # each core has a process
    threading.Thread(target=_live_with, args=(parent,), daemon=True).start()


def _live_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(HEARTBEAT)
    os._exit(1)


# One tensor


def _make(row: Row, places: Mapping[str, Place], *, folder: Path, quantize: Quantize) -> Digests:
    """Writes the output of one row into the files of `folder`, and returns the digest of every tensor written."""
    fast_reference.keep_memory()
    writer, reader = TensorWriter(folder, places), Reader(row.stored)
    try:
        if row.rule is None or row.rule.weight is None:
            _copy(row, writer, reader)
        else:
            _quantize(row, row.rule.weight, writer, reader, quantize)
        return {slot.name: writer.digest(slot.name) for slot in row.slots}
    finally:
        writer.close()
        reader.close()


def _copy(row: Row, writer: TensorWriter, reader: Reader) -> None:
    stored, size = row.stored, row.stored.slot.nbytes
    for begin in range(0, size, COPY):
        data = reader.read(begin, min(begin + COPY, size))
        if stored.slot.dtype == "BOOL":
            check_bools(data, name=name_of(stored))
        if row.dtype in PATTERNS:
            first = begin // DTYPES[stored.slot.dtype][1]
            check_finite(data.view(row.dtype), name=name_of(stored), first=first, shape=stored.slot.shape)
        writer.write(row.slots[0].name, data.data, offset=begin)


def _quantize(row: Row, grid: Grid, writer: TensorWriter, reader: Reader, quantize: Quantize) -> None:
    shape, per_weight = row.shape, len(row.slots) // len(row.paths)
    for number, weight in enumerate(weights_of(row, reader)):
        extremes = weight.extremes(shared=grid.scale == "nvfp4") if sees_whole_tensor(grid) else None
        for begin, w in weight.blocks():
            parts = encode(w, grid, quantize=quantize, extremes=extremes)
            for slot in row.slots[number * per_weight : (number + 1) * per_weight]:
                name = slot.name.rpartition(".")[2]
                part = np.array(shape, np.int64) if name == "weight_shape" else parts[name]
                first = part_rows(slot.shape, begin, shape=shape, bits=grid.element.bits)
                if first is not None:
                    writer.write(slot.name, _bytes(part), offset=first * (slot.nbytes // slot.shape[0]))


def _quantize_here(w: NDArray[Any], grid: Grid) -> Packed:
    return native.quantize_packed(w, grid) if native.available() else pack(fast_reference.quantize(w, grid))


def _quantize_on(engine: Arrays, w: NDArray[Any], grid: Grid) -> Packed:
    return pack(engine.quantize(engine.from_numpy(w), grid).map(engine.to_numpy))


def _bytes(part: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
