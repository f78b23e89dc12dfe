"""Writing a model directory that is larger than memory: every offset first, then blocks in any order, then a rename."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from qkit.errors import ArtifactError, QkitError
from qkit.storage import swap
from qkit.storage.destination import check_place, destination
from qkit.storage.layout import INDEX, SHARD_BYTES, Slot, lay_out
from qkit.storage.marks import MARK, SEAL
from qkit.storage.place_writer import CHUNK, Pen, write_all
from qkit.storage.staging import Staging, write_synced

FLUSH = 64 << 20  #: bytes that are closed before they are sent to the disk


@dataclass(frozen=True, slots=True)
class Stream:
    """One tensor to write: its slot, and a function that gives its bytes from the first to the last, in blocks."""

    slot: Slot
    blocks: Callable[[], Iterable[bytes | memoryview]]


def write_directory(
    folder: Path,
    streams: Iterable[Stream],
    *,
    metadata: Mapping[str, str],
    files: Mapping[str, bytes | Path],
    shard_bytes: int = SHARD_BYTES,
    fingerprint: str = "",
) -> None:
    """Writes `folder` whole or not at all, one block of one tensor in memory at a time. Arguments and errors: see `Output`."""
    by_name = {stream.slot.name: stream for stream in streams}
    slots = [stream.slot for stream in by_name.values()]
    output = Output(folder, slots, metadata=metadata, files=files, shard_bytes=shard_bytes, fingerprint=fingerprint)
    with output:
        for name in output.missing:
            offset = 0
            for block in by_name[name].blocks():
                offset += output.write(name, block, offset=offset)
            output.close(name)


class Output:
    """A directory being written, aside; it takes its place when the block ends well.

    `write` each of `missing` and `close` it. A tensor that is closed is in a journal, with its digest; with a `fingerprint`,
    a later run with the same one goes on from there, after it has read the digests again. A run that fails otherwise than
    by the system's fault leaves nothing behind.

    Args:
        folder: made, or replaced if it is one that this class wrote; links are followed to the real place first.
        slots: every tensor.
        metadata: of every weights file: at most one key.
        files: the other files by name, as bytes or as a file to copy.
        shard_bytes: most bytes of tensors in one file.
        fingerprint: what the bytes follow from; empty where a run cannot be resumed.

    Raises:
        ArtifactError: `folder` is not one to replace, or an interrupted run with another fingerprint is in the way.
        PlanError: its disk is read-only; see `check_directory`.
        LockedError: another process writes `folder`.
        OSError: the disk is full, and so on.
    """

    def __init__(
        self,
        folder: Path,
        slots: Iterable[Slot],
        *,
        metadata: Mapping[str, str],
        files: Mapping[str, bytes | Path],
        shard_bytes: int = SHARD_BYTES,
        fingerprint: str = "",
    ) -> None:
        self._place = destination(folder)
        self._staging = Staging(self._place)
        self.layout = lay_out(slots, metadata=metadata, shard_bytes=shard_bytes)
        self.files = {**files, **({INDEX: self.layout.index.encode()} if self.layout.index else {})}
        self.fingerprint = fingerprint and self._fingerprint(fingerprint)
        self.aside = self._place.aside
        self._digests: dict[str, str] = {}
        self._opened: dict[str, int] = {}
        self._pen = Pen(self.aside, self.layout.places)
        self._flusher, self._flushes, self._unflushed = ThreadPoolExecutor(1), list[Future[None]](), 0

    @property
    def missing(self) -> list[str]:
        """Names of the tensors that are not closed, in the order they lie in the files."""
        places = self.layout.places
        left = [name for name in places if name not in self._digests]
        return sorted(left, key=lambda name: (places[name].file, places[name].begin))

    @property
    def nbytes(self) -> int:
        """Bytes of all the files of the directory; known before the first tensor is, since digests have one length."""
        others = sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in self.files.values())
        return sum(self.layout.sizes.values()) + others + len(self._seal(dict.fromkeys(self.layout.places, _sha([]))))

    def __enter__(self) -> "Output":
        check_place(self._place)
        try:
            self._staging.take()
            self._begin(self._read_journal())
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def write(self, name: str, block: bytes | memoryview, *, offset: int = 0) -> int:
        """Puts `block` at `offset` of tensor `name`; returns its length."""
        return self._pen.write(name, block, offset=offset)

    def close(self, name: str, *, digest: str | None = None) -> None:
        """Says that every byte of tensor `name` is written; `digest` is what a `Pen` of another process gave for it."""
        self._digests[name] = digest or self._pen.digest(name)
        self._staging.note([name, self._digests[name]])
        self._unflushed += self.layout.places[name].nbytes
        if self._unflushed > FLUSH:  # the disk works while the next tensors are made
            self._unflushed = 0
            self._flushes.append(self._flusher.submit(self._sync))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish()
        except BaseException as late:
            self._tidy(late)
            raise
        else:
            self._tidy(error)

    def _tidy(self, error: BaseException | None) -> None:
        """Lets go of everything; removes what is aside, unless another run can use it."""
        self._flusher.shutdown()
        self._pen.close()
        for descriptor in self._opened.values():
            os.close(descriptor)
        self._opened.clear()
        resumable = isinstance(error, _Kept) or (error and not isinstance(error, QkitError))
        self._staging.release(keep=bool(self.fingerprint and resumable))

    # beginning, or going on

    def _fingerprint(self, sources: str) -> str:
        """Of everything that the bytes of the directory follow from; headers name the grids and the numerics."""
        parts = [sources, *(f"{name} {_sha([header])}" for name, header in sorted(self.layout.headers.items()))]
        for name, content in sorted(self.files.items()):
            parts.append(f"{name} {_sha(_blocks(content))}")
        return _sha(["\n".join(parts).encode()])

    def _read_journal(self) -> dict[str, str]:
        """What an interrupted run with the same fingerprint had closed."""
        entries = [
            entry for line in self._staging.journal if (entry := _entry(line))
        ]  # a kill may have cut the last line
        before = entries[0][1] if entries and entries[0][0] == "fingerprint" else ""
        if not self._staging.is_reusable() or not before or not self.fingerprint:
            return {}
        if before != self.fingerprint:
            raise _Kept(
                f"{self.aside} is from an interrupted run with another source, recipe or version of qkit: "
                "repeat that run to finish it, or remove it"
            )
        return dict(entries[1:])

    def _begin(self, closed: Mapping[str, str]) -> None:
        if not closed:
            self._staging.clear()
        self._staging.begin()
        for file, header in self.layout.headers.items():
            path = self.aside / file
            self._opened[file] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            write_all(self._opened[file], header, 0)
            os.truncate(self._opened[file], self.layout.sizes[file])
        self._staging.start_journal(self.fingerprint)
        for name, digest in closed.items():  # what was closed is read again: the machine may have lost power since
            if name in self.layout.places and self._pen.digest(name) == digest:
                self._digests[name] = digest
                self._staging.note([name, digest])

    # ending

    def _finish(self) -> None:
        if self.missing:
            raise RuntimeError(f"{self.missing[0]} was never closed")
        for stray in self.aside.iterdir():
            if stray.name not in {*self.layout.headers, *self.files, MARK}:
                stray.unlink()
        for name, content in {**self.files, SEAL: self._seal(self._digests)}.items():
            write_synced(self.aside / name, _blocks(content))
        for flush in self._flushes:
            flush.result()  # the system tells a failed write once, and perhaps there
        self._sync()
        swap.sync_folder(self.aside)
        try:
            self._staging.put_in_place()
        except ArtifactError as error:  # somebody has put something there meanwhile
            raise _Kept(str(error)) from None

    def _sync(self) -> None:
        for descriptor in self._opened.values():
            os.fsync(descriptor)

    def _seal(self, digests: Mapping[str, str]) -> bytes:
        table = {
            "files": sorted({*self.layout.headers, *self.files}),
            "headers": {file: _sha([header]) for file, header in sorted(self.layout.headers.items())},
            "tensors": dict(sorted(digests.items())),
        }
        return (json.dumps(table, indent=1) + "\n").encode()


class _Kept(ArtifactError):
    """The directory aside is not to be removed: it is another run's, or complete and its place is taken."""


def _blocks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as stream:
        while block := stream.read(CHUNK):
            yield block


def _entry(line: str) -> tuple[str, str] | None:
    try:
        name, digest = json.loads(line)
    except (ValueError, TypeError):
        return None
    return str(name), str(digest)


def _sha(blocks: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for block in blocks:
        found.update(block)
    return found.hexdigest()
