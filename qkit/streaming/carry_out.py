"""A plan carried out: tensors stream from the source to the output, block by block, one tensor in each process."""

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
from qkit.grid import Grid
from qkit.reference.packing import Packed
from qkit.storage.destination import destination
from qkit.storage.layout import DTYPES, Place
from qkit.storage.place_writer import Pen
from qkit.storage.read import Stored, check_bools
from qkit.streaming import fast_reference
from qkit.streaming.blocks import (
    PATTERNS,
    Quantize,
    check_codable,
    check_finite,
    encode,
    offset,
    row_blocks,
    sees_whole_tensor,
)
from qkit.streaming.plan import Plan, Row

COPY = 1 << 20  #: bytes of a block that is only copied
WORKERS = min(os.cpu_count() or 1, 4)  #: more than these wait for the disk, and each takes memory
HEARTBEAT = 0.2  #: seconds between two looks of a worker whether its parent lives
Tick = Callable[[str, int], None]
Task = tuple[Row, Mapping[str, Place]]
Digests = dict[str, str]
Work = Callable[[Row, Mapping[str, Place]], Digests]


def quantize_directory(plan: Plan, folder: Path, *, engine: Arrays, workers: int, tick: Tick) -> Path:
    """Writes what `plan` says into `folder`, all or nothing; interrupted, it goes on where it was.

    Args:
        engine: what makes codes. Their bits do not depend on it.
        workers: processes, for the NumPy engine; any other works alone, in this one.
        tick: told the name of each source tensor that is done and its bytes.

    Raises:
        RangeError: a weight holds what has no codes, or a copied tensor a NaN or an infinity.
        ArtifactError, PlanError, LockedError, OSError: see `Output`; or the source ended early.
    """
    check_apart(folder, plan.folder)
    with plan.output(folder, fingerprint=fingerprint(plan)) as output:
        missing = set(output.missing)
        rows = [row for row in plan.rows if any(slot.name in missing for slot in row.slots)]
        tick("", sum(row.stored.slot.nbytes for row in plan.rows) - sum(row.stored.slot.nbytes for row in rows))
        rows.sort(key=lambda row: -row.stored.slot.nbytes)  # the longest first, so that all processes end together
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
    """Raises ArtifactError where `out` is the place of `source`, the model to read."""
    if destination(out).path == source.resolve():
        raise ArtifactError(f"{out} is the model itself: choose another folder")


def fingerprint(plan: Plan) -> str:
    """What the source is, wherever it lies: of each file its name, size, header and time of last change.

    Not a digest of its tensors: reading them would cost as much as quantizing them, at every start. Whoever changes a weight
    and sets the clock back deceives this; a source that was copied without its times only begins anew.
    """
    stamps = []
    for file in sorted({row.stored.file for row in plan.rows}):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = hashlib.sha256(stream.read(length)).hexdigest()
        status = file.stat()
        stamps.append([file.name, status.st_size, status.st_mtime_ns, header])
    return json.dumps(stamps)


# Processes, not threads: most of NumPy's calls here take some microseconds, and threads would wait for each other between


def _in_processes(work: Work, tasks: Iterable[Task], *, workers: int) -> Iterator[tuple[Row, Digests]]:
    """Each row with what `work` gives for it, in the order in which they are done; the first error ends all."""
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
    """As `_in_processes`, in this one."""
    for row, places in tasks:
        yield row, work(row, places)


def _begin(parent: int) -> None:
    """In a worker: Ctrl-C is the parent's to handle, and without a parent there is nothing to work for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    native.use_threads(1)  # each core has a process
    threading.Thread(target=_live_with, args=(parent,), daemon=True).start()


def _live_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(HEARTBEAT)
    os._exit(1)


# One tensor


def _make(row: Row, places: Mapping[str, Place], *, folder: Path, quantize: Quantize) -> Digests:
    """Writes what becomes of one row into the files of `folder`; gives the digest of every tensor written."""
    fast_reference.keep_memory()
    pen, reader = Pen(folder, places), _Reader(row.stored)
    try:
        if row.rule is None or row.rule.weight is None:
            _copy(row, pen, reader)
        else:
            _quantize(row, row.rule.weight, pen, reader, quantize)
        return {slot.name: pen.digest(slot.name) for slot in row.slots}
    finally:
        pen.close()
        reader.close()


def _copy(row: Row, pen: Pen, reader: "_Reader") -> None:
    stored, size = row.stored, row.stored.slot.nbytes
    for begin in range(0, size, COPY):
        data = reader.read(begin, min(begin + COPY, size))
        if stored.slot.dtype == "BOOL":
            check_bools(data, name=_name(stored))
        if row.dtype in PATTERNS:
            first = begin // DTYPES[stored.slot.dtype][1]
            check_finite(data.view(row.dtype), name=_name(stored), first=first, shape=stored.slot.shape)
        pen.write(row.slots[0].name, data.data, offset=begin)


def _quantize(row: Row, grid: Grid, pen: Pen, reader: "_Reader", quantize: Quantize) -> None:
    shape = row.stored.slot.shape
    extremes = _extremes(row, reader) if sees_whole_tensor(grid) else None
    for begin, w in _blocks(row, reader):
        parts = encode(w, grid, quantize=quantize, extremes=extremes)
        for slot in row.slots:
            name = slot.name.rpartition(".")[2]
            part = np.array(shape, np.int64) if name == "weight_shape" else parts[name]
            place = offset(slot, begin, shape=shape, bits=grid.element.bits)
            if place is not None:
                pen.write(slot.name, _bytes(part), offset=place)


def _extremes(row: Row, reader: "_Reader") -> tuple[float, float]:
    """The least and the greatest of a whole tensor."""
    found = [(float(x.min()), float(x.max())) for _, w in _blocks(row, reader) for x in [w.astype(np.float32)]]
    return min(low for low, _ in found), max(high for _, high in found)


def _blocks(row: Row, reader: "_Reader") -> Iterator[tuple[int, NDArray[Any]]]:
    """Blocks of rows of a weight, each with the number of its first row; good until the next one."""
    stored, n = row.stored, row.stored.slot.shape[1]
    width = n * DTYPES[stored.slot.dtype][1]
    for begin, end in row_blocks(stored.slot.shape):
        w = reader.read(begin * width, end * width).view(row.dtype).reshape(end - begin, n)
        check_codable(w, name=_name(stored), first=begin * n, shape=stored.slot.shape)
        yield begin, w


class _Reader:
    """Reads stretches of one tensor into one buffer."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._opened = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
        self._buffer = np.empty(0, np.uint8)

    def read(self, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes `begin` to `end` of the tensor; good until the next call."""
        if self._buffer.size < end - begin:
            self._buffer = np.empty(end - begin, np.uint8)
        data, got = self._buffer[: end - begin], 0
        while got < data.size:
            count = os.preadv(self._opened, [data[got:].data], self._stored.begin + begin + got)
            if not count:
                raise ArtifactError(f"{_name(self._stored)} ends early: the file has changed since it was opened")
            got += count
        return data

    def close(self) -> None:
        """Closes the file."""
        os.close(self._opened)


def _quantize_here(w: NDArray[Any], grid: Grid) -> Packed:
    return native.quantize_packed(w, grid) if native.available() else pack(fast_reference.quantize(w, grid))


def _quantize_on(engine: Arrays, w: NDArray[Any], grid: Grid) -> Packed:
    return pack(engine.quantize(engine.from_numpy(w), grid).map(engine.to_numpy))


def _name(stored: Stored) -> str:
    return f"{stored.file}: {stored.slot.name}"


def _bytes(part: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
