"""Putting one directory in the place of another in one step, and the lock against two writers."""

import ctypes
import fcntl
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from qkit.errors import LockedError
from qkit.storage.marks import remove

AT_FDCWD = -100
PATIENCE = 1.0  #: seconds to wait for a lock
EXCHANGE = 2  #: Linux's RENAME_EXCHANGE and macOS's RENAME_SWAP


def lock(file: Path) -> int:
    """A locked descriptor of `file`, which is made where it is missing. Closing it, or the end of the process, unlocks it.

    Waits up to `PATIENCE`, since the workers of a killed process live a little longer than the process.

    Raises:
        LockedError: another process has the lock.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        with suppress(FileNotFoundError, BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(file).st_ino:
                return descriptor  # the file is still there: its last owner has not removed it
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise LockedError(f"{file} is held by another process, which writes this folder: wait for it")
        time.sleep(PATIENCE / 20)


def put_in_place(new: Path, folder: Path, previous: Path) -> bool:
    """Puts the directory `new` at `folder`. A kill leaves the old or the new directory there. The caller removes the old one.

    Returns:
        False where the old directory is now at `new`. True where it is at `previous`: a system that cannot exchange two
        directories in one step has a moment with neither at `folder`, and `recover` repairs a kill in that moment.
    """
    if not folder.exists() or not any(folder.iterdir()):
        os.rename(new, folder)
    elif not _exchange(new, folder):
        os.rename(folder, previous)
        try:
            os.rename(new, folder)
        except OSError:
            os.rename(previous, folder)
            raise
        sync_folder(folder.parent)
        return True
    sync_folder(folder.parent)
    return False


def recover(folder: Path, previous: Path) -> None:
    """Repairs a killed `put_in_place`: puts the old directory back after the first step, removes it after the second."""
    if previous.exists():
        if folder.exists():
            remove(previous)
        else:
            os.rename(previous, folder)


def bring_to_disk(descriptor: int) -> None:
    """Returns when the bytes of an open file are on the disk."""
    os.fsync(descriptor)


def leave_to_system(descriptor: int) -> None:
    """Brings nothing to the disk: the system does so within a minute, as after `cp`. For copies that are easily made anew."""


def sync_folder(folder: Path) -> None:
    """Syncs the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step. Returns False where the system or the file system has no such step."""
    library, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(one), os.fsencode(other))
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return bool(library.renamex_np(*names, EXCHANGE) == 0)
    if not hasattr(library, "renameat2"):
        return False
    return bool(library.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], EXCHANGE) == 0)
