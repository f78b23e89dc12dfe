"""Ctrl-C during training: the first ends it after the step, with a checkpoint."""

import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from qkit.cli.console import errors


class Stopping:
    """Lets Ctrl-C end the training after the step, with a checkpoint. A second Ctrl-C, or one at other times, acts at once."""

    def __init__(self, tell: Callable[[Mapping[str, Any]], None]) -> None:
        self._tell, self._presses, self._steps, self._training = tell, 0, 0, False
        self._before = signal.getsignal(signal.SIGINT)

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread() and callable(self._before):
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if threading.current_thread() is threading.main_thread() and callable(self._before):
            signal.signal(signal.SIGINT, self._before)
            if kind is KeyboardInterrupt and self._presses == 1 and self._training:
                signal.raise_signal(signal.SIGINT)  # the command ends as after any other Ctrl-C

    def asked(self) -> bool:
        """Whether the run should stop."""
        return self._presses > 0

    def tell(self, event: Mapping[str, Any]) -> None:
        """Passes an event on, and sees from it whether steps are taken."""
        self._steps = event.get("steps", self._steps)
        self._training = event["event"] != "end" and event["step"] < self._steps
        self._tell(event)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self._presses += 1
        if self._training and self._presses == 1:
            errors.print("Ctrl-C: stops after this step, with a checkpoint; once more: at once", highlight=False)
        elif callable(self._before):
            self._before(number, frame)
