"""Writing a model directory that is larger than memory: headers first, then blocks in any order, then one rename."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from qkit.errors import ArtifactError, QkitError
from qkit.storage import swap
from qkit.storage.batches import in_threads, in_turn
from qkit.storage.destination import check_place, destination
from qkit.storage.known_digests import KnownDigests
from qkit.storage.layout import INDEX, SHARD_BYTES, Layout, Slot, lay_out
from qkit.storage.marks import MARK, SEAL, strangers_in
from qkit.storage.staging import Staging, unmark_companions, write_companion, write_synced
from qkit.storage.swap import bring_to_disk
from qkit.storage.tensor_writer import CHUNK, TensorWriter, reserve, write_all

LINES = 1000  #: lines of a seal that are written together
FLUSH = 64 << 20  #: bytes of closed tensors after which a sync to the disk begins


@dataclass(frozen=True, slots=True)
class Stream:
    """One tensor to write: its slot, and a function that returns its bytes in order, in blocks."""

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
    known: KnownDigests | None = None,
    bring: Callable[[int], None] = bring_to_disk,
) -> None:
    """Writes `folder` whole or not at all, on all cores, with one block of each thread in memory.

    See `lay_out` and `Output` for arguments and errors.

    Args:
        known: stated digests of bytes in memory. A tensor that is exactly such bytes carries its digest on; the rest is compared.
        bring: brings the bytes of an open file to the disk, see `Output`.

    Raises:
        ArtifactError: bytes that were compared are not those of `known`.
    """
    by_name = {stream.slot.name: stream for stream in streams}
    layout = lay_out([stream.slot for stream in by_name.values()], metadata=metadata, shard_bytes=shard_bytes)
    with Output(folder, layout, files=files, fingerprint=fingerprint, bring=bring) as output:

        def write(names: Sequence[str]) -> None:
            with closing(TensorWriter(output.aside, layout.places)) as writer:
                for name in names:
                    offset, nbytes, digest = 0, layout.places[name].nbytes, None
                    for block in by_name[name].blocks():
                        carried = known.carry(block) if known and len(block) == nbytes else None
                        digest = carried[0] if carried else None
                        if not (carried and writer.copy(name, carried[1])):
                            offset += writer.write(name, block, offset=offset, digest=digest)
                    output.close(name, digest=digest or writer.digest(name))

        missing, places = set(output.missing), layout.places
        names = (name for name in by_name if name in missing)  # neighbors may share their work
        in_threads(write, in_turn(names, lambda name: places[name].nbytes, group=lambda name: places[name].file))
        if known:
            known.compare(known.left)


class Output:
    """A directory of weights, written in a staging directory that takes its place when the `with` block ends without an error.

    In the block, `write` and `close` each tensor of `missing`. The journal records closed tensors with their digests. A later
    run with the same `fingerprint` resumes there, after it has compared the digests with the files. A run that raises a
    `QkitError` leaves no file behind.

    Args:
        folder: the directory to write. An earlier output of this class is replaced. Links lead to the real place.
        layout: the weights files.
        files: the other files by name, as bytes or as a file to copy.
        fingerprint: text that identifies the source of the bytes; empty where a run cannot be resumed.
        like: a directory whose permissions a new `folder` gets; None leaves them to the system.
        bring: called with each open weights file, brings its bytes to the disk; see `leave_to_system`.

    Raises:
        ArtifactError: `folder` may not be replaced, or an interrupted run with another fingerprint is in the way.
        PlanError: the disk is read-only; see `check_directory`.
        LockedError: another process writes `folder`.
        OSError: the disk is full, and so on.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        files: Mapping[str, bytes | Path],
        fingerprint: str = "",
        like: Path | None = None,
        bring: Callable[[int], None] = bring_to_disk,
    ) -> None:
        self._place = destination(folder)
        self._staging = Staging(self._place, like=like)
        self.layout = layout
        self.files = {**files, **({INDEX: self.layout.index.encode()} if self.layout.index else {})}
        self.fingerprint = fingerprint and self._fingerprint(fingerprint)
        self.aside, self._bring = self._place.aside, bring
        self._digests: dict[str, str] = {}
        self._closing = threading.Lock()
        self._opened: dict[str, int] = {}
        self._writer = TensorWriter(self.aside, self.layout.places)
        self._flusher, self._flushes, self._unflushed = ThreadPoolExecutor(1), list[Future[None]](), 0

    @property
    def missing(self) -> list[str]:
        """Names of the tensors that are not closed, in their order in the files."""
        places = self.layout.places
        left = [name for name in places if name not in self._digests]
        return sorted(left, key=lambda name: (places[name].file, places[name].begin))

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the directory. Known before any tensor is written, since all digests have one length."""
        others = sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in self.files.values())
        seal = seal_blocks(self.layout, self.files, dict.fromkeys(self.layout.places, digest_of([])))
        return sum(self.layout.sizes.values()) + others + sum(map(len, seal))

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
        """Writes `block` at `offset` of tensor `name`, and returns its length."""
        return self._writer.write(name, block, offset=offset)

    def close(self, name: str, *, digest: str | None = None) -> None:
        """Records that tensor `name` is complete. `digest` is that of another `TensorWriter`, if one wrote it.

        Threads may call it at one time.
        """
        digest = digest or self._writer.digest(name)
        with self._closing:
            self._digests[name] = digest
            self._staging.note([name, digest])
            self._unflushed += self.layout.places[name].nbytes
            if self._unflushed > FLUSH:  # the disk writes while the next tensors are computed
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
        """Closes files, unlocks the place, and removes the staging directory unless a later run can resume there."""
        self._flusher.shutdown()
        self._writer.close()
        for descriptor in self._opened.values():
            os.close(descriptor)
        self._opened.clear()
        resumable = isinstance(error, _StagingStays) or (error and not isinstance(error, QkitError))
        self._staging.release(keep=bool(self.fingerprint and resumable))

    # Beginning and resuming

    def _fingerprint(self, sources: str) -> str:
        return digest_of([sources.encode(), identity(self.layout, self.files).encode()])

    def _read_journal(self) -> dict[str, str]:
        """Names and digests of the tensors that an interrupted run with the same fingerprint had closed."""
        before = self._staging.interrupted()
        if not before or not self.fingerprint:
            return {}
        if before != self.fingerprint:
            raise _StagingStays(
                f"{self.aside} is from an interrupted run with another source, recipe or version of qkit: "
                "repeat that run to finish it, or remove it"
            )
        pairs = [pair for line in self._staging.journal if (pair := _parse(line))]  # a kill may have cut the last line
        return dict(pairs[1:])

    def _begin(self, closed: Mapping[str, str]) -> None:
        if not closed:
            self._staging.clear()
        self._staging.begin()
        for file, header in self.layout.headers.items():
            path = self.aside / file
            self._opened[file] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            write_all(self._opened[file], header, 0)
            reserve(self._opened[file], self.layout.sizes[file])
        self._staging.start_journal(self.fingerprint)
        for name, digest in closed.items():  # digests are computed again: the machine may have lost power since
            if name in self.layout.places and self._writer.digest(name) == digest:
                self._digests[name] = digest
                self._staging.note([name, digest])

    # Finishing

    def _finish(self) -> None:
        if self.missing:
            raise RuntimeError(f"{self.missing[0]} was never closed")
        for stray in strangers_in(self.aside, {*self.layout.headers, *self.files, MARK, SEAL}):
            if stray.is_file() and stray.name != MARK:
                stray.unlink()
        for name, content in self.files.items():
            write_companion(self.aside, name, blocks_of(content))
        write_synced(self.aside / SEAL, seal_blocks(self.layout, self.files, self._digests))
        unmark_companions(self.aside, self.files)
        for flush in self._flushes:
            flush.result()  # the system reports a failed write once, perhaps here
        self._sync()
        swap.sync_folder(self.aside)
        try:
            self._staging.put_in_place()
        except ArtifactError as error:  # another program has written there meanwhile
            raise _StagingStays(str(error)) from None

    def _sync(self) -> None:
        for descriptor in self._opened.values():
            self._bring(descriptor)


def identity(layout: Layout, files: Mapping[str, bytes | Path]) -> str:
    """Text for the output's headers and other files. Headers name the grids and the version of the numerics."""
    lines = [f"{name} {digest_of([header])}" for name, header in sorted(layout.headers.items())]
    return "\n".join([*lines, *(f"{name} {digest_of(blocks_of(content))}" for name, content in sorted(files.items()))])


def seal_blocks(layout: Layout, files: Mapping[str, bytes | Path], digests: Mapping[str, str]) -> Iterator[bytes]:
    """The seal of a directory, the content of its `qkit.json`, in blocks: 100,000 lines at once would take 100 MB."""
    table: dict[str, Any] = {
        "files": sorted({*layout.headers, *files}),
        "headers": {file: digest_of([header]) for file, header in sorted(layout.headers.items())},
        "tensors": {},
    }
    text, names = json.dumps(table, indent=1), sorted(digests)
    begin, end = (text.removesuffix("}\n}"), "\n }\n}\n") if names else (text, "\n")
    yield begin.encode()
    for first in range(0, len(names), LINES):
        lines = ",".join(
            f"\n  {json.dumps(name)}: {json.dumps(digests[name])}" for name in names[first : first + LINES]
        )
        yield ("," * bool(first) + lines).encode()
    yield end.encode()


class _StagingStays(ArtifactError):
    """The staging directory has to stay: it is another run's, or it is complete and its place is taken."""


def blocks_of(content: bytes | Path) -> Iterator[bytes]:
    """`content`, or the bytes of that file, in blocks."""
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as stream:
        while block := stream.read(CHUNK):
            yield block


def _parse(line: str) -> tuple[str, str] | None:
    try:
        name, digest = json.loads(line)
    except (ValueError, TypeError):
        return None
    return str(name), str(digest)


def digest_of(blocks: Iterable[bytes]) -> str:
    """SHA-256 of all `blocks` together."""
    found = hashlib.sha256()
    for block in blocks:
        found.update(block)
    return found.hexdigest()
