"""Work on many tasks in several processes, each with one thread.

Processes, not threads: NumPy's calls on tensors take microseconds, and between calls threads would wait for each other.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import chain, islice
from multiprocessing import get_context
from typing import Final, TypeVar

from qkit import native

Task = TypeVar("Task")
Result = TypeVar("Result")

HEARTBEAT: Final = 0.2  #: seconds after which a worker checks again that its parent lives
WAITING: Final = 2  #: tasks that are in a process or wait for it: each is in memory


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(work: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int) -> Iterator[Result]:
    """The result of `work` for each task, in the order of completion. The first error ends all work.

    One worker, or one task, needs no process of its own. `work` and the tasks are pickled otherwise.
    """
    left = iter(tasks)
    first = list(islice(left, 2))
    if workers == 1 or len(first) < 2:
        yield from map(work, chain(first, left))
        return
    context = get_context("fork" if sys.platform == "linux" else "spawn")  # elsewhere, frameworks do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(os.getpid(),)) as pool:
        try:
            pending = {pool.submit(work, task) for task in chain(first, islice(left, WAITING * workers - 2))}
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                pending |= {pool.submit(work, task) for task in islice(left, len(done))}
                yield from _results(list(done))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _results(done: Sequence[Future[Result]]) -> Iterator[Result]:
    return (one.result() for one in done)


def _begin(parent: int) -> None:
    """Prepares a worker: the parent handles Ctrl-C, and the worker ends when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    native.use_threads(1)  # each core has a process
    threading.Thread(target=_live_with, args=(parent,), daemon=True).start()


def _live_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(HEARTBEAT)
    os._exit(1)
