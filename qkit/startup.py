"""The command line imports its packages: Ctrl-C is one line and exit code 130, as later. Does nothing in other programs."""

import gc
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


@contextmanager
def uncollected() -> Iterator[None]:
    """Collects no garbage inside the block, and never looks again at the objects made there, if the process is the command line.

    Imports leave no garbage. Looking for it took a quarter of the time in which a command starts.
    """
    if not _is_command_line() or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _end(signum: int, frame: FrameType | None) -> None:
    os.write(2, LINE.encode())
    os._exit(INTERRUPTED)


def _is_command_line() -> bool:
    """Whether this process was started as `qkit` or as `python -m qkit`."""
    program = os.path.basename(getattr(sys, "argv", [""])[0])
    words = sys.orig_argv
    if program in ("-m", "__main__.py") and "-m" in words:  # Python names the file once the package is imported
        return words[words.index("-m") + 1 :][:1] == ["qkit"]
    return program in ("qkit", "qkit.exe")
