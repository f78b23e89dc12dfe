"""The progress of a command over bytes or other things: a bar on a terminal, elsewhere a line a minute, on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from qkit.cli.console import errors, size

EVERY: Final = 60.0  #: seconds between two lines
Tick = Callable[[str, int], None]


@contextmanager
def showing(total: int) -> Iterator[Tick]:
    """A function to call with the name and the bytes of each thing that is done, out of `total` bytes."""
    with _shown(total, _Speed(), size, "") as tick:
        yield tick


@contextmanager
def counting(total: int, things: str) -> Iterator[Tick]:
    """A function to call with a name and the number of `things` that are done, out of `total` of them."""
    with _shown(total, MofNCompleteColumn(), lambda count: f"{count:,.0f}", f" {things}") as tick:
        yield tick


@contextmanager
def _shown(total: int, column: ProgressColumn, say: Callable[[float], str], unit: str) -> Iterator[Tick]:
    if not sys.stderr.isatty():
        yield _Lines(total, say, unit).tick
        return
    name = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), column, TimeRemainingColumn(), name)
    with Progress(*columns, console=errors, transient=True, auto_refresh=False) as bar:  # no thread: workers are forked
        task = bar.add_task("", total=total)
        yield lambda name, done: bar.update(task, advance=done, description=name, refresh=True)


class _Lines:
    def __init__(self, total: int, say: Callable[[float], str], unit: str) -> None:
        self._total, self._done, self._say, self._unit = total, 0, say, unit
        self._begin = self._last = time.monotonic()
        self._before: int | None = (
            None  # bytes that an earlier run had done, which say nothing about the speed of this one
        )

    def tick(self, name: str, done: int) -> None:
        """Counts, and prints a line if the last one is old."""
        self._before = done if self._before is None and not name else self._before or 0
        self._done += done
        now = time.monotonic()
        if now - self._last < EVERY:
            return
        self._last = now
        speed = (self._done - self._before) / (now - self._begin)
        left = f", about {(self._total - self._done) / speed / 60:.0f} min left" if speed else ""
        so_far, total, each = map(self._say, (self._done, self._total, speed))
        errors.print(f"{so_far} of {total}{self._unit}, {each}{self._unit}/s{left}", highlight=False)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        """MB/s of source read."""
        return Text(f"{(task.speed or 0) / 1e6:.0f} MB/s")
