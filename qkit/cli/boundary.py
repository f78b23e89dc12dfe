"""The end of a command: a failure is one line on standard error and an exit code. Exit codes are defined here only."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

from qkit.cli.console import errors, to_output
from qkit.errors import LockedError, PlanError, QkitError, VerificationError
from qkit.startup import INTERRUPTED

DEBUG: Final = "QKIT_DEBUG"
INPUT, LOCKED, MACHINE, UNVERIFIED, DEFECT, READER_GONE = 3, 4, 5, 6, 70, 141
LONGEST: Final = 2000  #: the most characters of a message: a value in it may be as long as its file

#: Each code and its meaning, for `--help` and the README.
MEANINGS: Final = {
    0: "success",
    1: "differences, where a comparison was asked for",
    2: "wrong usage",
    INPUT: "bad input: a file, a recipe or a value; the line names it",
    LOCKED: "another process writes there",
    MACHINE: "it does not fit: the recipe, or a part of the model is missing; or the machine: no room, no permission, no memory",
    UNVERIFIED: "a verification failed",
    DEFECT: "a defect of qkit: please report it",
    INTERRUPTED: "Ctrl-C",
    READER_GONE: "the reader of the output went away, as `head` does",
}

#: Exit codes by class of error, subclasses first.
_CODES = {LockedError: LOCKED, PlanError: MACHINE, VerificationError: UNVERIFIED, QkitError: INPUT}

#: The way out of a fault of the input, by its errno.
_INPUT: Final = {
    errno.ENOENT: "name one that exists",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "a part of its path is a file: name a directory",
    errno.ELOOP: "its links lead in a circle: name the file itself",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EEXIST: "choose another name, or remove it",
    errno.ENOTEMPTY: "choose another name, or empty it",
    errno.EINVAL: "name a regular file",
    errno.ENXIO: "name a regular file",
    errno.ESPIPE: "name a regular file",
}

#: The way out of a fault of the machine, by its errno.
_MACHINE: Final = {
    errno.ENOSPC: "make room on that disk, or choose another",
    errno.EDQUOT: "make room within your quota, or choose another disk",
    errno.EFBIG: "choose a file system that holds larger files",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system has too many open files",
    errno.ENOMEM: "close other programs, or take a machine with more memory",
    errno.EIO: "the disk failed: check it, and repeat the command",
}


def run(command: Callable[[], Any]) -> None:
    """Runs `command` and ends the process with its exit code; see `MEANINGS`.

    Raises:
        SystemExit: always, except where `QKIT_DEBUG` is set and the command fails. Then the error of the command.
    """
    _prepare_streams()
    out = sys.stdout
    with _interrupts() as interrupts:
        try:
            code = _attempt(command)
            if sys.stdout is not out:  # Typer replaces a stream whose reader went away, and exits with 1
                sys.stdout, code = out, READER_GONE
            with to_output():  # now: at exit, nobody would report a full disk
                sys.stdout.flush()
        except BaseException as error:
            code = INTERRUPTED if interrupts else exit_code(error)
            if code == READER_GONE:
                pass
            elif os.environ.get(DEBUG):
                raise
            elif code != INTERRUPTED:
                _say(_message(error))
        if code == INTERRUPTED:
            _say("interrupted")
        _drop_output()
    sys.exit(code)


def _attempt(command: Callable[[], Any]) -> int:
    try:
        command()
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    return 0


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ended with `error`; see `MEANINGS`."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return READER_GONE
    if isinstance(error, OSError):
        return INPUT if error.errno in _INPUT else MACHINE
    if _is_out_of_memory(error):
        return MACHINE
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), DEFECT)


def _message(error: BaseException) -> str:
    if isinstance(error, QkitError):
        return str(error)
    if isinstance(error, OSError):
        files = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        reason = error.strerror or str(error) or type(error).__name__
        remedy = {**_INPUT, **_MACHINE}.get(error.errno or 0, "repeat the command; if it fails again, look at the disk")
        return ": ".join(part for part in (files, reason.lower(), remedy) if part)
    if _is_out_of_memory(error):
        return f"out of memory ({error or type(error).__name__}): {_MACHINE[errno.ENOMEM]}"
    return f"{type(error).__name__}: {error} (a defect of qkit; {DEBUG}=1 shows where)"


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether this process, a framework or a worker, which the system then killed, ran out of memory."""
    torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, (MemoryError, BrokenExecutor)) or torch


def _say(message: str) -> None:
    """Prints one line on standard error. Escapes control characters, which may come from a stranger's file."""
    line = " ".join(message.split())
    line = line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    with suppress(OSError, ValueError):
        errors.print(f"qkit: {line}", highlight=False, soft_wrap=True)


def _prepare_streams() -> None:
    """Opens closed standard streams on the null device, and lets the others escape characters that they cannot encode.

    Otherwise a file that is opened later would get the number of a closed stream, and receive the output of libraries.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  for the whole process
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Discards the rest of standard output if it cannot be written, so that it does not fail again at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, sys.stdout.fileno())
            os.close(nothing)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Records the interrupts of this command, since some packages turn a KeyboardInterrupt into an error of their own."""
    seen: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        seen.append(signum)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
