"""One directory in the place of another in one step, and a lock against two writers."""

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
    """A descriptor of `file`, made if need be, that no other process holds; closing it, or dying, lets go.

    Waits for a moment, for the workers of a process that was killed live a little longer than it.

    Raises:
        LockedError: another process holds it.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        with suppress(FileNotFoundError, BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == os.stat(file).st_ino:
                return descriptor  # and not one that its last owner has just removed
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise LockedError(f"{file} is held by another process, which writes this folder: wait for it")
        time.sleep(PATIENCE / 20)


def put_in_place(new: Path, folder: Path, previous: Path) -> bool:
    """`new` becomes `folder`. Killed at any moment, `folder` is the old one or the new one. The caller removes the old one.

    It is in the place of `new`; or, if this returns True, it is `previous`: where the system cannot exchange two directories in
    one step there is a moment without either, which `recover` mends.
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
    """Puts back the old directory if a `put_in_place` was killed between its two steps; removes it if after both."""
    if previous.exists():
        if folder.exists():
            remove(previous)
        else:
            os.rename(previous, folder)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system or the file system cannot."""
    library, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(one), os.fsencode(other))
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return bool(library.renamex_np(*names, EXCHANGE) == 0)
    if not hasattr(library, "renameat2"):
        return False
    return bool(library.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], EXCHANGE) == 0)
