"""Writing tensors into files that are laid out already: from any process, each tensor from one."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from qkit.storage.layout import Place

CHUNK = 1 << 20


class Pen:
    """Writes at the places of a layout, into files of `folder` that exist, and digests what it writes."""

    def __init__(self, folder: Path, places: Mapping[str, Place]) -> None:
        self._folder, self._places = folder, places
        self._opened: dict[str, int] = {}
        self._running: dict[str, _Running] = {}

    def write(self, name: str, block: bytes | memoryview, *, offset: int = 0) -> int:
        """Puts `block` at `offset` of tensor `name`; returns its length."""
        place, data = self._places[name], memoryview(block).cast("B")
        if offset + len(data) > place.nbytes:
            raise ValueError(f"{name} has {place.nbytes} bytes: {len(data)} at {offset} are too many")
        running = self._running.setdefault(name, _Running())
        if running.end == offset:  # what comes in order is digested as it comes
            running.digest.update(data)
            running.end += len(data)
        try:
            write_all(self._open(place.file), data, place.begin + offset)
        except OSError as error:  # the system does not say of which file
            raise OSError(error.errno, error.strerror, str(self._folder / place.file)) from None
        return len(data)

    def digest(self, name: str) -> str:
        """SHA-256 of tensor `name`, all of whose bytes are written."""
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


class _Running:
    """The digest of what has come of one tensor, as far as it came in order."""

    def __init__(self) -> None:
        self.digest, self.end = hashlib.sha256(), 0


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Every byte that is written goes through here."""
    left = memoryview(data)
    while left:
        done = os.pwrite(descriptor, left, offset)
        left, offset = left[done:], offset + done
