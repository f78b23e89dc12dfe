"""Files and JSON from outside: regular files only, size limits before reading, and values of bounded depth."""

import codecs
import io
import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

from qkit.errors import ArtifactError, QkitError

TEXT_BYTES: Final = 1 << 25  #: most bytes of a configuration or a recipe: 33.6 MB
DEPTH: Final = 64  #: most levels of lists and tables within each other
INTEGER: Final = 1 << 63  #: whole numbers are smaller than this: longer ones are slow to compute with and to print

KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_regular(file: Path) -> int:
    """Bytes of a regular file. Does not open the file, since opening a pipe may never end.

    Raises:
        ArtifactError: the file is a pipe, a device, a socket or a directory.
        OSError: there is no such file, or the system refuses its status.
    """
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for fits, name in KINDS if fits(status.st_mode)), "no regular file")
        raise ArtifactError(f"{file} is {kind}: put a regular file there")
    return status.st_size


def read_text(file: Path, *, most: int = TEXT_BYTES) -> str:
    """The text of a regular file of at most `most` bytes, without the byte-order mark that some editors put before it.

    Raises:
        ArtifactError: the file is no regular file, is longer, or is UTF-16.
        OSError: the file cannot be read.
        UnicodeDecodeError: the text is not UTF-8.
    """
    size = check_regular(file)
    if size > most:
        raise ArtifactError(f"{file} has {size:,} bytes, and qkit reads at most {most:,} there: fetch it again")
    data = file.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ArtifactError(f"{file} is text in UTF-16: save it as UTF-8")
    with io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig") as stream:  # which reads all ends of lines as \n
        return stream.read()


def parse_json(text: str | bytes, *, parse_int: Callable[[str], float] = int) -> Any:
    """The value of JSON text.

    Args:
        parse_int: returns the value of a whole number.

    Raises:
        ValueError: the text is no JSON, or an object has a key twice; or see `check_values`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=parse_int)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEPTH} levels") from None
    check_values(value)
    return value


def parse_table(text: bytes) -> dict[str, Any]:
    """The object of JSON text. Raises as `parse_json`, and for any other value."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def check_values(value: Any) -> None:
    """Checks nested tables and lists, without recursion.

    Raises:
        ValueError: the value is nested deeper than `DEPTH`, or has an integer of `INTEGER` or more.
    """
    level = [value]
    for depth in range(DEPTH + 1):
        if depth == DEPTH and any(type(one) in (dict, list) for one in level):
            raise ValueError(f"it is nested deeper than {DEPTH} levels")
        inner: list[Any] = []
        for one in level:  # by their exact types, as parsers make them: headers of large models have 100,000 values
            kind = type(one)
            if kind is dict:
                inner.extend(one.values())
            elif kind is list:
                inner.extend(one)
            elif kind is int and not -INTEGER < one < INTEGER:
                raise ValueError(f"it holds an integer of {one.bit_length()} bits")
        level = inner


@contextmanager
def time_limit(seconds: float, error: QkitError) -> Iterator[None]:
    """Raises `error` in a block that takes longer. Regular expressions from outside may never end.

    Works on the main thread of a system with alarms. Elsewhere, the block runs to its end.
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
