"""A plan carried out: tensors stream from the source to the output, block by block, several blocks at a time."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16
import numpy as np
from numpy.typing import NDArray

from qkit.backend import Backend
from qkit.checkpoint import kernels
from qkit.checkpoint.blocks import PATTERNS, check_codable, check_finite, encode, offset, row_blocks, sees_whole_tensor
from qkit.checkpoint.layout import DTYPES
from qkit.checkpoint.output import Output
from qkit.checkpoint.plan import Plan, Row
from qkit.checkpoint.source import Stored
from qkit.errors import ArtifactError
from qkit.grid import Grid
from qkit.qtensor import QTensor

COPY = 1 << 20  #: bytes of a block that is only copied
Tick = Callable[[str, int], None]


def quantize_directory(plan: Plan, folder: Path, *, engine: Backend, workers: int, tick: Tick) -> Path:
    """Writes what `plan` says into `folder`, all or nothing; interrupted, it goes on where it was.

    Args:
        engine: what makes codes. Their bits do not depend on it.
        workers: threads; more than one only where the engine is thread-safe, as NumPy is.
        tick: told the name of a source tensor and how many of its bytes are done, from any thread.

    Raises:
        RangeError: a weight holds what has no codes, or a copied tensor a NaN or an infinity.
        ArtifactError, LockedError, OSError: see `Output`; or the source ended early.
    """
    with plan.output(folder, fingerprint=fingerprint(plan)) as output:
        missing = set(output.missing)
        jobs = []
        for row in plan.rows:
            if any(slot.name in missing for slot in row.slots):
                jobs.append(_Job(row))
            else:
                tick(row.stored.slot.name, row.stored.slot.nbytes)
        _Crew(output, engine, tick).work(jobs, workers)
    return folder


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


@dataclass(slots=True)
class _Job:
    """One row of the plan under way."""

    row: Row
    left: int = 0
    low: float = np.inf
    high: float = -np.inf
    looking: int = 0
    looked: threading.Event = field(default_factory=threading.Event)

    @property
    def extremes(self) -> tuple[float, float] | None:
        """Of the whole tensor, where its grid asks for them."""
        return (self.low, self.high) if self.sees_whole_tensor else None

    @property
    def sees_whole_tensor(self) -> bool:
        return bool(self.row.rule and self.row.rule.weight and sees_whole_tensor(self.row.rule.weight))


class _Crew:
    """Threads that take blocks off one list, in order."""

    def __init__(self, output: Output, engine: Backend, tick: Tick) -> None:
        self.output, self.tick = output, tick
        self.quantize = kernels.quantize if engine.name == "numpy" else partial(_quantize_on, engine)
        self.mutex = threading.Lock()
        self.stop = threading.Event()
        self.source = _Source()

    def work(self, jobs: Iterable[_Job], workers: int) -> None:
        """Does all the jobs; the first error of any thread is raised when all have stopped."""
        tasks = self._tasks(jobs)
        kernels.keep_memory()
        try:
            with ThreadPoolExecutor(workers) as pool:
                hands = [pool.submit(self._hand, tasks) for _ in range(workers)]
                try:
                    done, _ = wait(hands, return_when=FIRST_EXCEPTION)
                finally:
                    self.stop.set()  # also at Ctrl-C
            for hand in done:
                hand.result()
        finally:
            self.source.close()

    def _hand(self, tasks: Iterator[Callable[[], None]]) -> None:
        while not self.stop.is_set():
            with self.mutex:
                task = next(tasks, None)
            if task is None:
                return
            try:
                task()
            except BaseException:
                self.stop.set()
                raise

    def _tasks(self, jobs: Iterable[_Job]) -> Iterator[Callable[[], None]]:
        for job in jobs:
            row = job.row
            if row.rule is None:
                size = row.stored.slot.nbytes
                spans = [(begin, min(begin + COPY, size)) for begin in range(0, size, COPY)] or [(0, 0)]
                verb = self._copy
            else:
                spans = list(row_blocks(row.stored.slot.shape))
                verb = self._quantize
                if job.sees_whole_tensor:
                    job.looking = len(spans)
                    for begin, end in spans:
                        yield partial(self._look, job, begin, end)
            job.left = len(spans)
            for begin, end in spans:
                yield partial(verb, job, begin, end)

    def _copy(self, job: _Job, begin: int, end: int) -> None:
        stored = job.row.stored
        data = self.source.read(stored, begin, end)
        if job.row.dtype in PATTERNS:
            first = begin // DTYPES[stored.slot.dtype][1]
            check_finite(data.view(job.row.dtype), name=_name(stored), first=first, shape=stored.slot.shape)
        self.output.write(job.row.slots[0].name, data.data, offset=begin)
        self._done(job, end - begin)

    def _look(self, job: _Job, begin: int, end: int) -> None:
        w = self._block(job, begin, end).astype(np.float32)
        low, high = float(w.min()), float(w.max())
        with self.mutex:
            job.low, job.high = min(job.low, low), max(job.high, high)
            job.looking -= 1
            if not job.looking:
                job.looked.set()

    def _quantize(self, job: _Job, begin: int, end: int) -> None:
        while job.sees_whole_tensor and not job.looked.wait(0.1):
            if self.stop.is_set():
                return
        row, w = job.row, self._block(job, begin, end)
        assert row.rule is not None
        assert row.rule.weight is not None
        parts = encode(w, row.rule.weight, quantize=self.quantize, extremes=job.extremes)
        for slot in row.slots:
            part = parts[slot.name.rpartition(".")[2]]
            if slot.name.endswith(".weight_shape"):
                part = np.array(row.stored.slot.shape, np.int64)
            place = offset(slot, begin, shape=row.stored.slot.shape, bits=row.rule.weight.element.bits)
            if place is not None:
                self.output.write(slot.name, _bytes(part), offset=place)
        self._done(job, w.nbytes)

    def _block(self, job: _Job, begin: int, end: int) -> NDArray[Any]:
        stored = job.row.stored
        n = stored.slot.shape[1]
        width = n * DTYPES[stored.slot.dtype][1]
        w = self.source.read(stored, begin * width, end * width).view(job.row.dtype).reshape(end - begin, n)
        check_codable(w, name=_name(stored), first=begin * n, shape=stored.slot.shape)
        return w

    def _done(self, job: _Job, nbytes: int) -> None:
        with self.mutex:
            job.left -= 1
            last = not job.left
        if last:
            for slot in job.row.slots:
                self.output.close(slot.name)
        self.tick(job.row.stored.slot.name, nbytes)


class _Source:
    """Reads stretches of tensors into one buffer for each thread."""

    def __init__(self) -> None:
        self._opened: dict[Path, int] = {}
        self._mutex = threading.Lock()
        self._local = threading.local()

    def read(self, stored: Stored, begin: int, end: int) -> NDArray[np.uint8]:
        """Bytes `begin` to `end` of a tensor; good until this thread reads again."""
        with self._mutex:
            if stored.file not in self._opened:
                self._opened[stored.file] = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or buffer.size < end - begin:
            buffer = self._local.buffer = np.empty(end - begin, np.uint8)
        data: NDArray[np.uint8] = buffer[: end - begin]
        got = 0
        while got < data.size:
            count = os.preadv(self._opened[stored.file], [data[got:].data], stored.begin + begin + got)
            if not count:
                raise ArtifactError(f"{stored.file} ends within {stored.slot.name}: it has changed since it was opened")
            got += count
        return data

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._opened.values():
            os.close(descriptor)


def _quantize_on(engine: Backend, w: NDArray[Any], grid: Grid) -> QTensor[NDArray[Any]]:
    return engine.quantize(engine.from_numpy(w), grid).map(engine.to_numpy)


def _name(stored: Stored) -> str:
    return f"{stored.file}: {stored.slot.name}"


def _bytes(part: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
