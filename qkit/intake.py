"""Files and JSON from strangers: regular files alone, sizes before contents, and values of bounded depth and size."""

import json
import os
import signal
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

from qkit.errors import ArtifactError, QkitError

TEXT_BYTES: Final = 1 << 25  #: most bytes of a configuration or a recipe: 33.6 MB
DEPTH: Final = 64  #: most levels of lists and tables within each other
INTEGER: Final = (
    1 << 63
)  #: whole numbers are smaller than this: longer ones cost time to compute with, and even to print

KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(file: Path) -> int:
    """The bytes of a file that can be opened without waiting. Looks at it only: opening a pipe may never end.

    Raises:
        ArtifactError: it is a pipe, a device, a socket or a directory.
        OSError: there is none, or it may not be looked at.
    """
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for fits, name in KINDS if fits(status.st_mode)), "no regular file")
        raise ArtifactError(f"{file} is {kind}: put a regular file there")
    return status.st_size


def read_text(file: Path, *, most: int = TEXT_BYTES) -> str:
    """The text of a regular file of at most `most` bytes.

    Raises:
        ArtifactError: it is no regular file, or a longer one.
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    size = check_regular(file)
    if size > most:
        raise ArtifactError(f"{file} has {size:,} bytes, and qkit reads at most {most:,} there: fetch it again")
    return file.read_text(encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """The value that JSON text stands for.

    Raises:
        ValueError: it is no JSON, or a key stands twice; or see `check_values`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEPTH} levels") from None
    check_values(value)
    return value


def parse_table(text: bytes) -> dict[str, Any]:
    """The object that JSON text stands for. Raises as `parse_json`."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def check_values(value: Any) -> None:
    """Looks through tables and lists, without recursion.

    Raises:
        ValueError: they are nested deeper than `DEPTH`, or hold an integer of `INTEGER` and more.
    """
    level = [value]
    for depth in range(DEPTH + 1):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, (dict, list)):
                if depth == DEPTH:
                    raise ValueError(f"it is nested deeper than {DEPTH} levels")
                inner.extend(one.values() if isinstance(one, dict) else one)
            elif isinstance(one, int) and abs(one) >= INTEGER:
                raise ValueError(f"it holds an integer of {one.bit_length()} bits")
        level = inner


@contextmanager
def time_limit(seconds: float, error: QkitError) -> Iterator[None]:
    """Raises `error` in Python code that takes longer: for regular expressions of strangers, which may never end.

    Works on the main thread of a system with alarms. Elsewhere, the code runs to its end.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"{key!r} stands twice")
        table[key] = value
    return table
