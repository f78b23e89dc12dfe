"""Ctrl-C while the command line imports its packages: one line and exit code 130, as later. Does nothing in other programs."""

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
    """Ends this process at Ctrl-C inside the block, if the process is the command line.

    The process ends at once. An exception in the middle of an import would come out as an error of another package, and there is
    no work yet that could be lost.
    """
    if not _is_command_line() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if (
        before is not signal.default_int_handler
    ):  # the signal is ignored, as under `nohup`, or has a handler of the caller
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
