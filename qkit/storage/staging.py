"""A place that one process writes to: aside first, under a lock, and then in one step. Every output of qkit comes this way."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from qkit.storage import swap
from qkit.storage.destination import (
    Destination,
    check_content,
    check_directory,
    check_file,
    check_replaced_file,
    is_placing,
    put_back,
)
from qkit.storage.marks import MARK, PLACING, SEAL, check_journal, check_own, is_marked, mark, remove
from qkit.storage.place_writer import write_all

CONFIG = "config.json"  #: moved last but one to a mount point: without it, nobody takes what is there for a model


class Staging:
    """The directory beside a destination, where files are written before they take its place.

    `take` locks it and mends what a killed run left; `begin` makes it; `put_in_place` ends it; `release` lets go, always.

    Attributes:
        place: the destination.
        folder: the directory to write into.
        journal: the lines that an earlier run left, for the caller to go on from; empty where there are none.
    """

    def __init__(self, place: Destination) -> None:
        self.place, self.folder = place, place.aside
        self.journal: list[str] = []
        self._made: list[Path] = []
        self._lock: int | None = None

    def take(self) -> None:
        """Makes the parents, locks the journal, and puts in order what a killed run left.

        Raises:
            LockedError: another process writes to this place.
            ArtifactError: a name that would be used belongs to something else.
        """
        self._made = make_parents(self.place.path)
        self._lock = swap.lock(self.place.journal)
        try:
            self.journal = check_journal(self.place.journal)
            placing = is_placing(self.journal)
            for near in (self.place.aside, self.place.previous):
                check_own(near, placing=placing)
        except BaseException:
            self._let_go()  # before anything is removed: it is somebody's
            raise
        if not self.place.mounted:
            swap.recover(self.place.path, self.place.previous)
        put_back(self.place)

    def is_reusable(self) -> bool:
        """Whether the directory is one that a run was writing, and not the old one that it had replaced."""
        if not self.folder.is_dir():
            return False
        status = os.stat(self.folder)
        return is_marked(self.folder) or json.dumps([PLACING, status.st_dev, status.st_ino]) in self.journal

    def begin(self) -> None:
        """Makes the directory, and marks it as qkit's; what is in it stays where it can be used again."""
        if os.path.lexists(self.folder) and not self.is_reusable():
            remove(self.folder)
        self.folder.mkdir(exist_ok=True)
        mark(self.folder)

    def clear(self) -> None:
        """Removes the directory that an earlier run left."""
        if os.path.lexists(self.folder):
            remove(self.folder)

    def start_journal(self, fingerprint: str) -> None:
        """Begins the journal anew."""
        assert self._lock is not None
        os.truncate(self._lock, 0)
        self.note(["fingerprint", fingerprint])

    def note(self, entry: Sequence[object]) -> None:
        """Adds a line to the journal."""
        assert self._lock is not None
        write_all(self._lock, (json.dumps(entry) + "\n").encode(), os.fstat(self._lock).st_size)

    def put_in_place(self) -> None:
        """The directory, with a list of all its files in `qkit.json`, takes its place. Killed, there is the old or the new one.

        At a mount point there is no old one: files are moved into it, the list and the configuration last.

        Raises:
            ArtifactError: something has come to that place meanwhile.
        """
        check_content(self.place)
        if self.place.mounted:
            names = sorted(os.listdir(self.folder), key=lambda name: (name == SEAL, name == CONFIG))
            for name in names:
                if name != MARK:
                    os.rename(self.folder / name, self.place.path / name)
            swap.sync_folder(self.place.path)
            return
        status = os.stat(self.folder)
        self.note([PLACING, status.st_dev, status.st_ino])
        os.unlink(self.folder / MARK)
        swap.sync_folder(self.folder)
        if swap.put_in_place(self.folder, self.place.path, self.place.previous):
            self._discard(self.place.previous)

    def put_file_in_place(self, name: str) -> None:
        """File `name` of the directory takes the place of the destination."""
        with (self.folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(self.folder / name, self.place.path)
        swap.sync_folder(self.place.path.parent)

    def release(self, *, keep: bool) -> None:
        """Lets go. Unless `keep`, for a later run to go on, nothing is left beside the destination, parents included."""
        if self._lock is not None and not keep:
            self._discard(self.folder)
            if not os.path.lexists(self.folder):  # what could not be removed is known by its journal
                with suppress(OSError):
                    os.unlink(self.place.journal)
        self._let_go()
        remove_empty(self._made)

    def _let_go(self) -> None:
        if self._lock is not None:
            with suppress(OSError):
                if not os.fstat(self._lock).st_size:
                    os.unlink(self.place.journal)
            os.close(self._lock)
            self._lock = None

    def _discard(self, folder: Path) -> None:
        with suppress(OSError):
            if os.path.lexists(folder):
                remove(folder)


@contextmanager
def whole_file(out: str | Path) -> Iterator[Path]:
    """A path to write a new file to; the file appears at `out` when the block ends well, and nothing at all if not.

    Raises:
        ArtifactError, PlanError: see `check_file`.
        LockedError: another process writes `out`.
    """
    with _whole(check_file, out) as file:
        yield file


@contextmanager
def replaced_file(out: str | Path) -> Iterator[Path]:
    """As `whole_file`, for a file of qkit's that may be there: the old one or the new one, at any moment.

    Raises:
        ArtifactError, PlanError: see `check_replaced_file`.
        LockedError: another process writes `out`.
    """
    with _whole(check_replaced_file, out) as file:
        yield file


@contextmanager
def _whole(check: Callable[[str | Path], Destination], out: str | Path) -> Iterator[Path]:
    staging = Staging(check(out))
    try:
        staging.take()
        staging.clear()
        staging.start_journal("")
        staging.begin()
        file = staging.folder / staging.place.path.name
        yield file
        check(out)
        staging.put_file_in_place(file.name)
    finally:
        staging.release(keep=False)


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Writes a directory of `files`, whole or not at all, with a list of them in `qkit.json`.

    Raises:
        ArtifactError, PlanError: see `check_directory`.
        LockedError: another process writes `folder`.
    """
    staging = Staging(check_directory(folder))
    try:
        staging.take()
        staging.clear()
        staging.start_journal("")
        staging.begin()
        seal = (json.dumps({"files": sorted(files)}, indent=1) + "\n").encode()
        for name, content in {**files, SEAL: seal}.items():
            write_synced(staging.folder / name, [content])
        swap.sync_folder(staging.folder)
        staging.put_in_place()
    finally:
        staging.release(keep=False)


def write_synced(file: Path, blocks: Iterable[bytes]) -> None:
    """Writes `file` in a directory of qkit's own, durable when this returns; a link of that name is not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(file, flags, 0o666)
    try:
        end = 0
        for block in blocks:
            write_all(descriptor, block, end)
            end += len(block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_parents(path: Path) -> list[Path]:
    """Makes the parents of `path`; returns those that were not there, the innermost first."""
    missing = [parent for parent in path.parents if not os.path.lexists(parent)]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes those of `folders` that are empty, up to the first that is not."""
    for folder in folders:
        try:
            os.rmdir(folder)
        except OSError:
            return
