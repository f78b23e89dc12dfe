"""Ctrl-C while the command line imports its packages: one line and exit code 130, as later. Other programs are left alone."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  #: the exit code after Ctrl-C: 128 and the number of the signal
LINE = "qkit: interrupted\n"


@contextmanager
def interruptible() -> Iterator[None]:
    """Ends this process at Ctrl-C inside the block, where it is the command line.

    The process ends at once: an exception in the middle of an import comes out as another package's error, and nothing is begun
    that could be lost.
    """
    if not _is_command_line() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # `nohup` ignores the signal, and so does the caller's wish
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(signum: int, frame: FrameType | None) -> None:
    os.write(2, LINE.encode())
    os._exit(INTERRUPTED)


def _is_command_line() -> bool:
    """Whether this process was started as `qkit` or as `python -m qkit`."""
    program = os.path.basename(getattr(sys, "argv", [""])[0])
    if program == "-m":  # Python sets the name of the module when its package is imported
        words = sys.orig_argv
        return words[words.index("-m") + 1 :][:1] == ["qkit"]
    return program in ("qkit", "qkit.exe")
