"""Every output of qkit: written into a staging directory under a lock, then put in place in one step."""

import json
import os
import stat
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
from qkit.storage.marks import MARK, PLACING, SEAL, check_journal, check_own, folders_of, is_marked, mark, remove
from qkit.storage.swap import bring_to_disk
from qkit.storage.tensor_writer import write_all

LAST = ("config.json", SEAL)  #: moved last to a mount point: no program takes a directory without them for a model


class Staging:
    """The staging directory of a destination, and the lock that keeps other processes away.

    Call `take` to lock the place, `begin` to make the directory, `put_in_place` to finish, and `release` in every case.

    Args:
        like: a directory whose permissions the staging directory gets; by default, those of the destination.

    Attributes:
        place: the destination.
        folder: the staging directory.
        journal: lines of an earlier run's journal, from which the caller can resume; empty without an earlier run.
    """

    def __init__(self, place: Destination, *, like: Path | None = None) -> None:
        self.place, self.folder = place, place.aside
        self._like = place.path if like is None else like
        self.journal: list[str] = []
        self._made: list[Path] = []
        self._lock: int | None = None

    def take(self) -> None:
        """Makes the parents, locks the journal, and completes or undoes the last step of a killed run.

        Raises:
            LockedError: another process writes to this place.
            ArtifactError: a name that qkit needs belongs to another program.
        """
        self._made = make_parents(self.place.path)
        self._lock = swap.lock(self.place.journal)
        try:
            self.journal = check_journal(self.place.journal)
            placing = is_placing(self.journal)
            for near in (self.place.aside, self.place.previous):
                check_own(near, placing=placing)
        except BaseException:
            self._unlock()  # before any removal: the entries are another program's
            raise
        if not self.place.mounted:
            swap.recover(self.place.path, self.place.previous)
        put_back(self.place)

    def is_reusable(self) -> bool:
        """Whether the staging directory is an interrupted run's output, and not the old directory that a run had replaced."""
        if not self.folder.is_dir():
            return False
        status = os.stat(self.folder)
        return is_marked(self.folder) or json.dumps([PLACING, status.st_dev, status.st_ino]) in self.journal

    def interrupted(self) -> str:
        """The fingerprint of the interrupted run whose output is in the staging directory; empty where there is none."""
        if not self.journal or not self.is_reusable():
            return ""
        try:
            key, fingerprint = json.loads(self.journal[0])
        except (ValueError, TypeError):  # a kill has cut the line
            return ""
        return str(fingerprint) if key == "fingerprint" else ""

    def begin(self) -> None:
        """Makes the staging directory and marks it as qkit's. Keeps the content of an interrupted run.

        It has the permissions of the directory that it will replace, or of `like`, so that a private directory stays private.
        """
        if os.path.lexists(self.folder) and not self.is_reusable():
            remove(self.folder)
        self.folder.mkdir(exist_ok=True)
        if self._like.is_dir() and not self.place.mounted:
            _take_permissions(self.folder, self._like, least=stat.S_IRWXU)
        mark(self.folder)

    def clear(self) -> None:
        """Removes the staging directory of an earlier run."""
        if os.path.lexists(self.folder):
            remove(self.folder)

    def start_journal(self, fingerprint: str) -> None:
        """Begins a new journal."""
        assert self._lock is not None
        os.truncate(self._lock, 0)
        self.note(["fingerprint", fingerprint])

    def note(self, entry: Sequence[object]) -> None:
        """Adds a line to the journal."""
        assert self._lock is not None
        write_all(self._lock, (json.dumps(entry) + "\n").encode(), os.fstat(self._lock).st_size)

    def put_in_place(self) -> None:
        """Puts the staging directory, which has its seal, at the destination. A kill leaves the old or the new directory.

        A mount point has no old directory. There, files are moved one by one, the configuration and the seal last.

        Raises:
            ArtifactError: another program has written to the destination meanwhile.
        """
        check_content(self.place)
        if self.place.mounted:
            names = sorted(os.listdir(self.folder), key=lambda name: LAST.index(name) if name in LAST else -1)
            for name in names:
                if name != MARK:
                    os.rename(self.folder / name, self.place.path / name)
            swap.sync_folder(self.place.path)
            return
        status = os.stat(self.folder)
        self.note([PLACING, status.st_dev, status.st_ino])
        os.unlink(self.folder / MARK)
        swap.sync_folder(self.folder)
        current = _is_current(self.place.path)
        if swap.put_in_place(self.folder, self.place.path, self.place.previous):
            self._discard(self.place.previous)
        if current:  # else this process stays in the old directory, and its relative paths lead nowhere
            os.chdir(self.place.path)

    def put_file_in_place(self, name: str, *, bring: Callable[[int], None]) -> None:
        """Moves file `name` of the staging directory, whose bytes `bring` brings to the disk, to the destination, a file."""
        with (self.folder / name).open("rb") as stream:
            bring(stream.fileno())
        if self.place.path.is_file():
            _take_permissions(self.folder / name, self.place.path)
        os.replace(self.folder / name, self.place.path)
        swap.sync_folder(self.place.path.parent)

    def release(self, *, keep: bool) -> None:
        """Unlocks the place. Without `keep`, which is for a later run to resume, removes the staging files and empty parents."""
        if self._lock is not None and not keep:
            self._discard(self.folder)
            if not os.path.lexists(self.folder):  # a directory that stays is recognized by its journal
                with suppress(OSError):
                    os.unlink(self.place.journal)
        self._unlock()
        remove_empty(self._made)

    def _unlock(self) -> None:
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
def whole_file(out: str | Path, *, bring: Callable[[int], None] = bring_to_disk) -> Iterator[Path]:
    """A path to write a new file to. The file appears at `out` when the block ends without an error, and not otherwise.

    Args:
        bring: brings the bytes of the open file to the disk; see `leave_to_system`.

    Raises:
        ArtifactError, PlanError: see `check_file`.
        LockedError: another process writes `out`.
    """
    with _whole(check_file, out, bring) as file:
        yield file


@contextmanager
def replaced_file(out: str | Path) -> Iterator[Path]:
    """As `whole_file`, for a file that may exist already. At any moment `out` is the old file or the new one.

    Raises:
        ArtifactError, PlanError: see `check_replaced_file`.
        LockedError: another process writes `out`.
    """
    with _whole(check_replaced_file, out, bring_to_disk) as file:
        yield file


@contextmanager
def _whole(check: Callable[[str | Path], Destination], out: str | Path, bring: Callable[[int], None]) -> Iterator[Path]:
    staging = Staging(check(out))
    try:
        staging.take()
        staging.clear()
        staging.start_journal("")
        staging.begin()
        file = staging.folder / staging.place.path.name
        yield file
        check(out)
        staging.put_file_in_place(file.name, bring=bring)
    finally:
        staging.release(keep=False)


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> None:
    """Writes a directory of `files` and its list `qkit.json`, whole or not at all.

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


def write_companion(folder: Path, name: str, blocks: Iterable[bytes]) -> None:
    """Writes the file `name` of a working directory, perhaps in directories of it, which are marked while they have no list."""
    for inner in folders_of([name]):
        if not (folder / inner).is_dir():
            (folder / inner).mkdir()
            mark(folder / inner)
    write_synced(folder / name, blocks)


def unmark_companions(folder: Path, names: Iterable[str]) -> None:
    """Takes the marks off the directories that hold files of `names`, once the list of files is written."""
    for inner in reversed(folders_of(names)):
        with suppress(FileNotFoundError):
            os.unlink(folder / inner / MARK)
        swap.sync_folder(folder / inner)


def write_synced(file: Path, blocks: Iterable[bytes]) -> None:
    """Writes `file` in a working directory of qkit's and syncs it to the disk. Does not follow a link of that name."""
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


def _take_permissions(path: Path, old: Path, *, least: int = 0) -> None:
    """Gives `path` the permissions of `old`, and `least` besides. Does nothing on a file system without permissions."""
    with suppress(OSError):
        os.chmod(path, stat.S_IMODE(os.stat(old).st_mode) | least)


def _is_current(folder: Path) -> bool:
    """Whether `folder` is the current directory of this process."""
    try:
        return os.path.samefile(folder, ".")
    except OSError:
        return False


def make_parents(path: Path) -> list[Path]:
    """Makes the missing parents of `path`, and returns them, the innermost first."""
    missing = [parent for parent in path.parents if not os.path.lexists(parent)]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes `folders` in their order, up to the first that is not empty."""
    for folder in folders:
        try:
            os.rmdir(folder)
        except OSError:
            return
