"""Writing the bytes of tensors to their places in files that exist. Several processes may write, each its own tensors."""

import ctypes
import errno
import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from qkit.errors import ArtifactError
from qkit.storage.layout import Place
from qkit.storage.read import Stored

CHUNK = 1 << 20
PIECE = 1 << 18  #: bytes that are digested and written together
SPAN = 1 << 26  #: bytes that the system copies in one call, so that Ctrl-C has an effect
#: Errors of systems and pairs of disks that copy nothing between two files: the bytes are written instead.
UNABLE = frozenset((errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM))


class TensorWriter:
    """Writes tensors at the places of a layout into existing files of `folder`, and digests the bytes on the way."""

    def __init__(self, folder: Path, places: Mapping[str, Place]) -> None:
        self._folder, self._places = folder, places
        self._opened: dict[str, int] = {}
        self._running: dict[str, _RunningDigest] = {}

    def write(self, name: str, block: bytes | memoryview, *, offset: int = 0, digest: str | None = None) -> int:
        """Writes `block` at `offset` of tensor `name`, and returns its length.

        Args:
            digest: SHA-256 of the block, where the caller knows it and needs none from here.

        Raises:
            ValueError: the block is longer than the rest of the tensor.
            OSError: the disk is full, and so on; the error names the file.
        """
        place, data = self._places[name], memoryview(block).cast("B")
        if offset + len(data) > place.nbytes:
            raise ValueError(f"{name} has {place.nbytes} bytes: {len(data)} at {offset} are too many")
        running = None if digest else self._running.setdefault(name, _RunningDigest())
        try:
            for begin in range(0, len(data), PIECE):  # digested and written while it is in the processor's cache
                piece, at = data[begin : begin + PIECE], offset + begin
                if running and running.end == at:  # blocks in order
                    running.digest.update(piece)
                    running.end += len(piece)
                write_all(self._open(place.file), piece, place.begin + at)
        except OSError as error:  # the system's own error does not name the file
            raise OSError(error.errno, error.strerror, str(self._folder / place.file)) from None
        return len(data)

    def copy(self, name: str, stored: Stored) -> bool:
        """Copies tensor `name` from its place in a file, and digests nothing. Returns whether the system can.

        The bytes do not pass through this process. It is the call that `cp` makes.

        Raises:
            OSError: the disk is full, and so on; the error names the file.
            ArtifactError: the file has become shorter.
        """
        place, done = self._places[name], 0
        if not hasattr(os, "copy_file_range") or not place.nbytes:
            return False
        source = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while done < place.nbytes:
                size = min(SPAN, place.nbytes - done)
                here, there = stored.begin + done, place.begin + done
                moved = os.copy_file_range(source, self._open(place.file), size, here, there)
                if not moved:
                    raise ArtifactError(f"{stored.file} has become shorter: fetch it again")
                done += moved
        except OSError as error:
            if error.errno in UNABLE:
                return False
            raise OSError(error.errno, error.strerror, str(self._folder / place.file)) from None
        finally:
            os.close(source)
        return True

    def digest(self, name: str) -> str:
        """SHA-256 of tensor `name`, after all its bytes are written."""
        place, running = self._places[name], self._running.pop(name, None)
        if running and running.end == place.nbytes:
            return running.digest.hexdigest()
        found = hashlib.sha256()
        for begin in range(place.begin, place.begin + place.nbytes, CHUNK):
            length = min(CHUNK, place.begin + place.nbytes - begin)
            found.update(os.pread(self._open(place.file), length, begin))
        return found.hexdigest()

    def close(self) -> None:
        """Closes the files."""
        while self._opened:
            os.close(self._opened.popitem()[1])

    def _open(self, file: str) -> int:
        if file not in self._opened:
            self._opened[file] = os.open(self._folder / file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        return self._opened[file]


class _RunningDigest:
    """Digest of the first bytes of one tensor, up to `end`, written in order."""

    def __init__(self) -> None:
        self.digest, self.end = hashlib.sha256(), 0


def reserve(descriptor: int, size: int) -> None:
    """Gives an open file its `size` and, where the system can, the blocks on the disk: later writes cost a fifth less."""
    os.truncate(descriptor, size)
    if hasattr(_library(), "fallocate"):  # not `os.posix_fallocate`, which writes zeros where the file system cannot
        _library().fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size))


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at `offset` of an open file. Every byte that qkit writes goes through this function."""
    left = memoryview(data)
    while left:  # in pieces that stay in the processor's cache: large writes took twice the time
        done = os.pwrite(descriptor, left[:PIECE], offset)
        left, offset = left[done:], offset + done
